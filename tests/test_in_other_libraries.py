"""Libraries that build their own nn.LSTM, with ours in its place: their results stay, and docs/in_other_libraries.md is so.

A library that is not installed is skipped; the extra `libraries` brings all of them.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fused_lstm

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "in_other_libraries.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECTIONS = {  # of the page, after the first: what it imports, how many ratios it prints
    "RecurrentPPO": (["sb3_contrib"], 3),
    "DeepAR": (["pytorch_forecasting"], 2),
    "Parakeet": (["transformers"], 2),
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def outside_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for the package `kernels` of its hub, and must not find the folder of that name here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() not in (ROOT, tmp_path)])


def fused() -> AbstractContextManager:
    return mock.patch.object(nn, "LSTM", fused_lstm.LSTM)


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.RNNBase)]


def layers(model: nn.Module) -> set[type]:
    return {type(m) for m in recurrent(model)}


def assert_close(ours: Any, theirs: Any) -> None:
    """Up to rounding, which a few updates carry on."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def sections() -> dict[str, str]:
    return {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}


def test_the_page_has_a_section_for_each_library_and_code_in_sections_only() -> None:
    assert list(sections()) == ["How", *SECTIONS]
    assert not BLOCK.search(PAGE.split("\n## ")[0])


def test_the_ways_to_swap_on_the_page_run() -> None:
    (block,) = BLOCK.findall(sections()["How"])
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("section", SECTIONS)
def test_code_of_the_page_runs(section: str) -> None:
    """In a process of its own, from top to bottom: what it swaps, and what a library sets, is no other test's. Of what it
    times, a round is enough."""
    libraries, ratios = SECTIONS[section]
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    blocks = [b for part in ("How", section) for b in BLOCK.findall(sections()[part])]
    code = "import torch; torch.set_num_threads(1)\n" + re.sub(r"rounds=\d+", "rounds=1", "\n".join(blocks))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("times as fast") == ratios, run.stdout


# sb3-contrib

POLICIES: dict[str, dict[str, Any]] = {
    "two LSTMs": {"lstm_hidden_size": 32},
    "shared, two layers": {"lstm_hidden_size": 32, "shared_lstm": True, "enable_critic_lstm": False, "n_lstm_layers": 2},
    "actor's only": {"lstm_hidden_size": 32, "enable_critic_lstm": False},
}


def agent(way: str, env: str = "CartPole-v1", **policy_kwargs: Any) -> Any:
    """A RecurrentPPO whose LSTM is torch's, or ours by one of the ways of the page."""
    contrib = pytest.importorskip("sb3_contrib")
    common = pytest.importorskip("stable_baselines3.common.env_util")
    options = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "policy_kwargs": policy_kwargs}
    with fused() if way == "swapped" else nullcontext():
        policy = page_policy() if way == "policy" else "MlpLstmPolicy"
        model = contrib.RecurrentPPO(policy, common.make_vec_env(env, n_envs=2, seed=0), **options)
    if way == "replaced":
        fused_lstm.replace_lstm(model.policy)
    return model


def page_policy() -> type:
    """The policy that the page gives, read from it."""
    (block,) = [b for b in BLOCK.findall(sections()["RecurrentPPO"]) if "class FusedLstmPolicy" in b]
    policies = pytest.importorskip("sb3_contrib.common.recurrent.policies")
    names = {"fused_lstm": fused_lstm, "RecurrentActorCriticPolicy": policies.RecurrentActorCriticPolicy, "__name__": "page"}
    exec(block.split("\n\n\n")[0], names)
    return names["FusedLstmPolicy"]


@cache
def theirs_trained(options: str, env: str) -> Any:
    return agent("theirs", env, **POLICIES[options]).learn(384)


@pytest.mark.parametrize(
    ("way", "options", "env"),
    [
        *((way, options, "CartPole-v1") for way in ("replaced", "policy") for options in POLICIES),
        *((way, "two LSTMs", "Pendulum-v1") for way in ("replaced", "policy")),
        ("swapped", "two LSTMs", "CartPole-v1"),  # and then the same objects as if replaced
    ],
)
def test_recurrent_ppo_learns_the_same(way: str, options: str, env: str) -> None:
    """Rollouts and updates of 384 steps: episodes begin inside of sequences, and rows begin and end at different times."""
    theirs, ours = theirs_trained(options, env), agent(way, env, **POLICIES[options]).learn(384)
    assert layers(theirs.policy) == {nn.LSTM}
    assert layers(ours.policy) == {fused_lstm.LSTM}
    buffers = theirs.rollout_buffer, ours.rollout_buffer
    assert env != "CartPole-v1" or buffers[0].episode_starts.sum() > 2, "episodes begin within the rollout"
    for name in ("actions", "log_probs", "values", "hidden_states_pi", "cell_states_vf"):
        want, got = (torch.as_tensor(getattr(b, name)) for b in buffers)
        assert_close(got, want)
    want, got = ({k: float(v) for k, v in m.logger.name_to_value.items() if k.startswith("train/")} for m in (theirs, ours))
    assert {"train/loss", "train/value_loss", "train/policy_gradient_loss"} <= want.keys()
    assert_close(got, want)
    assert_close(parameters(ours.policy), parameters(theirs.policy))


@pytest.mark.parametrize("way", ["replaced", "swapped", "policy"])
def test_recurrent_ppo_has_the_same_gradients(way: str) -> None:
    theirs, ours = agent("theirs", lstm_hidden_size=32).learn(128), agent(way, lstm_hidden_size=32)
    ours.policy.load_state_dict(theirs.policy.state_dict())
    torch.manual_seed(0)
    batch = next(iter(theirs.rollout_buffer.get(128)))
    assert batch.episode_starts.any()
    for model in (theirs, ours):
        model.policy.set_training_mode(True)
        model.policy.zero_grad()
        terms = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten(), *batch[-3:-1])
        sum(t[batch.mask > 0].square().sum() for t in (terms[0].flatten(), *terms[1:])).backward()
    want = gradients(theirs.policy)
    assert any("lstm_actor" in name and g.any() for name, g in want.items())
    torch.testing.assert_close(gradients(ours.policy), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["replaced", "swapped", "policy"])
def test_recurrent_ppo_saves_and_loads(way: str) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    model = agent(way, lstm_hidden_size=32).learn(128)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = contrib.RecurrentPPO.load(file)
    assert layers(loaded.policy) == {fused_lstm.LSTM if way == "policy" else nn.LSTM}
    obs = model.get_env().reset()
    (a, state), (b, other) = (m.predict(obs, deterministic=True) for m in (model, loaded))
    assert (a == b).all()
    assert_close([torch.as_tensor(s) for s in state], [torch.as_tensor(s) for s in other])
    loaded.set_env(model.get_env())
    loaded.learn(128)


# pytorch-forecasting


def page_rnn() -> type:
    """The subclass that the page gives, read from it."""
    rnn = pytest.importorskip("pytorch_forecasting.models.nn.rnn")
    (block,) = [b for b in BLOCK.findall(sections()["DeepAR"]) if "class FusedRNN" in b]
    names = {"fused_lstm": fused_lstm, "rnn": rnn, "__name__": "page"}
    exec(block[block.index("class FusedRNN") :].split("\n\n\n")[0], names)
    return names["FusedRNN"]


def series() -> Any:
    """Six waves, cut into windows of up to 12 steps, with encoders of length 0 after DeepAR's shift of them by one."""
    forecasting, pandas = pytest.importorskip("pytorch_forecasting"), pytest.importorskip("pandas")
    t = torch.arange(40)
    noise = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    rows = [{"series": str(k), "t": int(s), "y": float((s / (3 + k)).sin() + noise[k, s] / 10)} for k in range(6) for s in t]
    return forecasting.TimeSeriesDataSet(
        pandas.DataFrame(rows),
        time_idx="t",
        target="y",
        group_ids=["series"],
        time_varying_unknown_reals=["y"],
        min_encoder_length=1,
        max_encoder_length=12,
        min_prediction_length=2,
        max_prediction_length=6,
        randomize_length=(0.5, 0.5),
    )


def forecaster(name: str, data: Any, ours: bool) -> Any:
    model_class = getattr(pytest.importorskip("pytorch_forecasting"), name)
    torch.manual_seed(0)
    options = {"hidden_size": 16, "dropout": 0.0 if torch.cuda.is_available() else 0.1, "learning_rate": 0.01}
    model = model_class.from_dataset(data, **options)
    for path, module in list(model.named_modules()):
        if ours and isinstance(module, nn.RNNBase):
            setattr(model, path, page_rnn().from_torch(module))
    return model


def fit(model: Any, data: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    torch.manual_seed(0)
    torch.cuda.manual_seed_all(0)
    trainer = pl.Trainer(max_steps=4, devices=1, gradient_clip_val=0.1, **QUIET)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=8, num_workers=0))
    model.to(DEVICE).eval()


def window(data: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    x, _ = next(iter(data.to_dataloader(train=True, batch_size=16, num_workers=0)))
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in x.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "count"), [("DeepAR", 1), ("TemporalFusionTransformer", 2)])
def test_forecasts_and_their_training_are_the_same(name: str, count: int) -> None:
    data = series()
    theirs, ours = forecaster(name, data, False), forecaster(name, data, True)
    start = parameters(theirs)
    assert len(recurrent(ours)) == count
    assert all(isinstance(m, fused_lstm.LSTM) for m in recurrent(ours))
    assert not any(isinstance(m, fused_lstm.LSTM) for m in recurrent(theirs))
    for model in (theirs, ours):
        fit(model, data)
    assert any((start[key] != value).any() for key, value in parameters(theirs).items())
    assert_close(parameters(ours), parameters(theirs))

    x = window(data)
    assert (x["encoder_lengths"] == 1).any() or name != "DeepAR", "an encoder of length 0"
    results, grads = [], []
    for model in (theirs, ours):
        torch.manual_seed(0)
        torch.cuda.manual_seed_all(0)
        model.train().zero_grad()
        results.append([model(x)["prediction"]])
        results[-1][0].square().mean().backward()
        grads.append(gradients(model))
        if name == "DeepAR":
            with torch.no_grad():
                results[-1].append(model.eval()(x, n_samples=5)["prediction"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert any(("rnn" in key or "lstm" in key) and g.any() for key, g in grads[0].items())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_deepar_checkpoint_loads_either_way(tmp_path: Path) -> None:
    forecasting, pl = pytest.importorskip("pytorch_forecasting"), pytest.importorskip("lightning.pytorch")
    data = series()
    model = forecaster("DeepAR", data, True)
    trainer = pl.Trainer(max_steps=1, devices=1, **QUIET)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=8, num_workers=0))
    trainer.save_checkpoint(tmp_path / "deepar.ckpt")
    theirs = forecasting.DeepAR.load_from_checkpoint(tmp_path / "deepar.ckpt", weights_only=False)
    assert not isinstance(theirs.rnn, fused_lstm.LSTM)
    ours = copy.deepcopy(theirs)
    ours.rnn = page_rnn().from_torch(ours.rnn)
    x = window(data)
    results = [m.to(DEVICE).eval()(x)["prediction"] for m in (model, theirs, ours)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)


# transformers


def built_fused(build: Callable[[], nn.Module]) -> nn.Module:
    with fused():
        return build()


WAYS: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "replaced": lambda build: fused_lstm.replace_lstm(build()),
    "swapped": built_fused,
    "recompute": lambda build: fused_lstm.replace_lstm(build(), recompute=True),
}


def recogniser(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = transformers.ParakeetEncoderConfig(**sizes, subsampling_conv_channels=8)
    options = {"vocab_size": 33, "blank_token_id": 32, "decoder_hidden_size": 24, "encoder_config": encoder}
    model = getattr(transformers, f"ParakeetFor{name}")(getattr(transformers, f"Parakeet{name}Config")(**options)).eval()
    for part in (model.decoder.embedding, model.decoder.lstm):
        for p in part.parameters():
            p.data *= 3  # an untrained model repeats itself
    return model.to(DEVICE)


def codec() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 32}
    model = transformers.EncodecModel(transformers.EncodecConfig(**sizes)).eval()
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.02)  # zero in an untrained model
    return model.to(DEVICE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["RNNT", "TDT"])
def test_recognised_texts_and_gradients_are_the_same(name: str, way: str) -> None:
    theirs, ours = recogniser(name), WAYS[way](lambda: recogniser(name))
    assert layers(theirs) == {nn.LSTM}
    assert layers(ours) == {fused_lstm.LSTM}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    draw = torch.Generator().manual_seed(0)
    features, mask = torch.randn(3, 160, 80, generator=draw), torch.arange(160) < torch.tensor([[160], [90], [50]])
    before = torch.randint(32, (3, 9), generator=draw).to(DEVICE)  # tokens read
    inputs = {"input_features": features.to(DEVICE), "attention_mask": mask.long().to(DEVICE)}
    durations = [33 + k for k in range(len(getattr(theirs.config, "durations", ())))]  # scored beside the tokens, and none
    options = {"decoder_start_token_id": 32, "suppress_tokens": durations or None, "max_new_tokens": 40}
    said, logits = [], []
    for model in (theirs, ours):
        said.append(model.generate(**inputs, **options).sequences)
        logits.append(model(**inputs, decoder_input_ids=before).logits)
        logits[-1].square().mean().backward()
    assert said[0].unique().numel() > 5
    assert torch.equal(said[1], said[0])
    assert_close(logits[1], logits[0])
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("way", WAYS)
def test_a_codecs_codes_sounds_and_gradients_are_the_same(way: str) -> None:
    theirs, ours = codec(), WAYS[way](codec)
    assert layers(theirs) == {nn.LSTM}
    assert layers(ours) == {fused_lstm.LSTM}
    assert len(recurrent(ours)) == len(recurrent(theirs)) == 2
    audio = torch.randn(2, 1, 6400, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for model in (theirs, ours):
        results.append(model(audio, bandwidth=6.0))
        (model.encoder(audio).square().mean() + results[-1].audio_values.square().mean()).backward()
    assert results[0].audio_codes.unique().numel() > 10
    assert torch.equal(results[1].audio_codes, results[0].audio_codes)
    assert_close(results[1].audio_values, results[0].audio_values)
    assert_close(gradients(ours), gradients(theirs))


def test_a_model_of_transformers_is_copied_pickled_and_saved(tmp_path: Path) -> None:
    ours, tokens = fused_lstm.replace_lstm(recogniser("RNNT")), torch.arange(6, device=DEVICE)[None]
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path).to(DEVICE)
    assert layers(loaded) == {nn.LSTM}
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded, fused_lstm.replace_lstm(copy.deepcopy(loaded))]
    with torch.no_grad():
        expected = ours.decoder(tokens)
        for model in copies:
            assert_close(model.decoder(tokens), expected)
