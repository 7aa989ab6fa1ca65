"""The embedded rollout: what it samples and reports, and how requests interact with batches and weight updates."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from tests.tiny_model import tiny_qwen2
from verl_troll.embedded import generation
from verl_troll.embedded.generation import Completion, Request, generate, token_log_probs

VOCAB = 32
STOP = 1


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return tiny_qwen2(VOCAB, end=STOP, initializer_range=0.3).eval()


PROMPTS = [(5, 6, 7, 8, 9, 10), (11,), (12, 13, 14), (11,)]


def plain_log_probs(model: Qwen2ForCausalLM, prompt: tuple[int, ...], completion: Completion) -> torch.Tensor:
    """``[tokens, v]`` log-probabilities at temperature 1, from one forward pass without padding or cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probs_equal_a_plain_forward_pass(model: Qwen2ForCausalLM, temperature: float) -> None:
    requests = [Request(p, 12, temperature=temperature, noise=(i,)) for i, p in enumerate(PROMPTS)]
    for request, completion in zip(requests, generate(model, requests), strict=True):
        expected = (plain_log_probs(model, request.prompt, completion) / temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-5, rtol=0)


def test_raw_log_probs_ignore_temperature_and_top_p(model: Qwen2ForCausalLM) -> None:
    (completion,) = generate(model, [Request((5, 6), 8, temperature=2.0, top_p=0.8)], "raw_logprobs")
    expected = plain_log_probs(model, (5, 6), completion).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-5, rtol=0)


def test_greedy_is_argmax(model: Qwen2ForCausalLM) -> None:
    requests = [Request(p, 10, temperature=0.0, top_p=0.5, top_k=3) for p in PROMPTS]
    for request, completion in zip(requests, generate(model, requests), strict=True):
        assert completion.token_ids == plain_log_probs(model, request.prompt, completion).argmax(-1).tolist()


def test_the_rest_of_the_batch_does_not_matter(model: Qwen2ForCausalLM) -> None:
    requests = [
        Request(p, 5 + 3 * i, temperature=0.5 + i / 2, top_p=1 - i / 10, stop_ids=frozenset({STOP}), noise=(i,))
        for i, p in enumerate(PROMPTS)
    ]
    together = generate(model, requests)
    for request, expected in zip(requests, together, strict=True):
        (alone,) = generate(model, [request])
        assert alone.token_ids == expected.token_ids and alone.stop_reason == expected.stop_reason
        assert alone.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


def test_candidates_are_the_most_probable_tokens_of_the_sampling_distribution(model: Qwen2ForCausalLM) -> None:
    requests = [
        Request(p, 4, temperature=0.7, candidates=c, noise=(i,))
        for i, (p, c) in enumerate(zip(PROMPTS, (3, 0, 99, 1), strict=True))
    ]
    for request, completion in zip(requests, generate(model, requests), strict=True):
        expected = (plain_log_probs(model, request.prompt, completion) / 0.7).log_softmax(-1)
        assert len(completion.candidates) == (len(completion.token_ids) if request.candidates else 0)
        for row, (ids, log_probs) in zip(expected, completion.candidates, strict=bool(request.candidates)):
            top = row.topk(min(request.candidates, VOCAB))
            assert ids.tolist() == top.indices.tolist()
            torch.testing.assert_close(log_probs, top.values, atol=1e-5, rtol=0)


def test_equal_prompts_are_read_once(model: Qwen2ForCausalLM) -> None:
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, arguments, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    requests = [Request(p, 3, noise=(i,)) for i, p in enumerate([(5, 6, 7), (8, 9, 10), (5, 6, 7), (5, 6, 7)])]
    generate(model, requests)
    hook.remove()
    assert read == [6, 4, 4]


def test_noise_decides_the_sample(model: Qwen2ForCausalLM) -> None:
    one, again, other = generate(model, [Request((5,), 16, noise=(k,)) for k in (3, 3, 4)])
    assert one.token_ids == again.token_ids != other.token_ids


def test_stop_tokens_and_limits(model: Qwen2ForCausalLM) -> None:
    every = frozenset(range(VOCAB))
    stopped, limited, longer = generate(
        model, [Request((5,), 9, stop_ids=every), Request((5, 6), 4), Request((7,), 11)]
    )
    assert (len(stopped.token_ids), stopped.stop_reason) == (1, "completed")
    assert (len(limited.token_ids), limited.stop_reason) == (4, "length")
    assert (len(longer.token_ids), longer.stop_reason) == (11, "length")


def test_frequencies_follow_the_filtered_distribution(model: Qwen2ForCausalLM) -> None:
    count = 4000
    requests = [Request((5, 6), 1, temperature=0.8, top_p=0.9, top_k=6, noise=(i,)) for i in range(count)]
    tokens = torch.tensor([c.token_ids[0] for c in generate(model, requests)])
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1:].float()
    probs = token_log_probs(logits, torch.tensor([0.8]), torch.tensor([0.9]), torch.tensor([6]))[0].exp()
    seen = torch.bincount(tokens, minlength=VOCAB) / count
    assert not bool((seen[probs == 0] > 0).any())
    assert float((seen - probs).abs().max()) < 5 * math.sqrt(0.25 / count)


def test_filters_keep_exactly_the_named_tokens() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.10]]).log().repeat(5, 1)
    kept = token_log_probs(
        logits,
        temperature=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]),
        top_p=torch.tensor([1.0, 0.7, 0.01, 0.6, 0.1]),
        top_k=torch.tensor([-1, -1, -1, 2, 1]),
    ).exp()
    expected = torch.tensor(
        [
            [0.5, 0.25, 0.15, 0.10],
            [2 / 3, 1 / 3, 0, 0],
            [1, 0, 0, 0],
            [1, 0, 0, 0],  # 0.5 of 0.75 reaches 0.6 after top_k
            [0.5, 0.25, 0.15, 0.10],
        ]
    )
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0)


def test_abort_returns_what_is_there(model: Qwen2ForCausalLM) -> None:
    asked = iter([False, False, True])
    (completion,) = generate(model, [Request((5,), 9)], aborted=lambda: next(asked))
    assert (len(completion.token_ids), completion.stop_reason) == (2, "aborted")


@pytest.mark.parametrize(
    "bad", [{"prompt": ()}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}]
)
def test_bad_requests_name_the_setting(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Request(**{"prompt": (1,), "max_tokens": 1, **bad})


# The server as verl uses it, but without Ray: all it needs is an event loop.


@pytest.fixture(scope="module")
def model_folder(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("model")
    vocab = {f"t{i}": i for i in range(VOCAB)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")), pad_token="t0", eos_token=f"t{STOP}"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def server(folder: Path, **rollout: Any) -> Any:
    from verl.workers.config import HFModelConfig, RolloutConfig

    from verl_troll.embedded.rollout import EmbeddedServer

    settings = {"dtype": "float32", "load_format": "auto", "prompt_length": 16, "response_length": 8, **rollout}
    config = RolloutConfig(name="hf", **settings)
    model_config = HFModelConfig(path=str(folder), override_config={"attn_implementation": "sdpa"})
    return EmbeddedServer(config, model_config, replica_rank=0)


PARAMS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(main)


def test_requests_that_arrive_together_run_together(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(model: Any, requests: list[Request], *rest: Any) -> list[Completion]:
        sizes.append(len(requests))
        return generate(model, requests, *rest)

    monkeypatch.setattr("verl_troll.embedded.rollout.generate", counting)

    async def main() -> Any:
        one = server(model_folder, max_num_seqs=6)
        calls = [one.generate([5, 6], {**PARAMS, "temperature": float(i % 2)}, str(i)) for i in range(10)]
        return await asyncio.gather(*calls)

    outputs = run(main())
    assert sizes == [6, 4]
    greedy = {tuple(output.token_ids) for output in outputs[::2]}
    assert len(greedy) == 1 and len({tuple(output.token_ids) for output in outputs[1::2]}) > 1
    assert all(len(o.log_probs) == len(o.token_ids) for o in outputs)


def test_two_servers_with_one_seed_agree(model_folder: Path) -> None:
    async def main(order: list[int], seed: int) -> list[set[tuple[int, ...]]]:
        one = server(model_folder, seed=seed)
        outputs = await asyncio.gather(*(one.generate([5 + i % 3], PARAMS, str(i)) for i in order))
        found: list[set[tuple[int, ...]]] = [set(), set(), set()]
        for i, output in zip(order, outputs, strict=True):
            found[i % 3].add(tuple(output.token_ids))
        return found

    first = run(main(list(range(12)), seed=1))
    assert first == run(main(list(reversed(range(12))), seed=1))
    assert first != run(main(list(range(12)), seed=2))


@pytest.mark.parametrize(
    ("params", "length"), [({"max_tokens": 3}, 3), ({"max_new_tokens": 2}, 2), ({}, 8), ({"max_tokens": 500}, 62)]
)
def test_limits_of_a_request(model_folder: Path, params: dict[str, int], length: int) -> None:
    async def main() -> Any:
        return await server(model_folder).generate([5, 6], {**PARAMS, "ignore_eos": True, **params}, "a")

    output = run(main())
    assert (len(output.token_ids), output.stop_reason) == (length, "length")


def test_log_probs_only_on_demand(model_folder: Path) -> None:
    async def main() -> Any:
        return await server(model_folder).generate([5], {**PARAMS, "logprobs": False}, "a")

    assert run(main()).log_probs is None


def test_weight_update_takes_effect(model: Qwen2ForCausalLM, model_folder: Path) -> None:
    changed = {name: -value for name, value in model.state_dict().items()}
    greedy = {**PARAMS, "temperature": 0}

    async def main() -> Any:
        one = server(model_folder)
        before = await one.generate([5, 6], greedy, "a")
        await one.update_weights(changed, global_steps=7)
        after = await one.generate([5, 6], greedy, "b")
        fresh = server(model_folder, load_format="dummy")
        with pytest.raises(RuntimeError, match="load_format=dummy"):
            await fresh.generate([5, 6], greedy, "c")
        await fresh.update_weights(changed, global_steps=7)
        return before, after, await fresh.generate([5, 6], greedy, "d")

    before, after, fresh = run(main())
    assert before.token_ids != after.token_ids and before.extra_fields["global_steps"] is None
    assert after.token_ids == fresh.token_ids and after.extra_fields["global_steps"] == 7


@pytest.mark.parametrize(("change", "named"), [("drop", "missing"), ("add", "unexpected")])
def test_weight_update_must_fit(model: Qwen2ForCausalLM, model_folder: Path, change: str, named: str) -> None:
    state = dict(model.state_dict())
    name = "model.norm.weight"
    if change == "drop":
        del state[name]
    else:
        state["odd." + name] = state[name]

    async def main() -> None:
        await server(model_folder).update_weights(state, global_steps=1)

    with pytest.raises(ValueError, match=rf"{named} \['[a-z.]*norm\.weight'\]"):
        run(main())


def test_an_error_in_generation_reaches_every_caller(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise FloatingPointError("no logits today")

    async def main() -> Any:
        one = server(model_folder)
        monkeypatch.setattr(one.model, "forward", broken)
        return await asyncio.gather(*(one.generate([5], PARAMS, str(i)) for i in range(3)), return_exceptions=True)

    assert [str(error) for error in run(main())] == ["no logits today"] * 3


@pytest.mark.parametrize(
    ("params", "named"), [({"stop": ["x"]}, "stop"), ({"repetition_penalty": 1.2}, "repetition_penalty")]
)
def test_unknown_sampling_parameters_are_refused(model_folder: Path, params: dict[str, Any], named: str) -> None:
    async def main() -> None:
        await server(model_folder).generate([5], {**PARAMS, **params}, "a")

    with pytest.raises(ValueError, match=named):
        run(main())


def test_a_prompt_without_room_is_refused(model_folder: Path) -> None:
    async def main() -> None:
        await server(model_folder).generate([5] * 64, PARAMS, "a")

    with pytest.raises(ValueError, match="no room"):
        run(main())


@pytest.mark.parametrize(("key", "value"), [("dtype", "int8"), ("load_format", "gguf"), ("logprobs_mode", "odd")])
def test_unknown_settings_are_refused(model_folder: Path, key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.{key}='{value}'"):
        server(model_folder, **{key: value})


def test_abort_holds_requests_until_resume(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> Any:
        one = server(model_folder, response_length=32)
        running = asyncio.create_task(one.generate([5], {**PARAMS, "ignore_eos": True}, "a"))
        while not one._in_flight:
            await asyncio.sleep(0.001)
        ended = await one.abort_all_requests()
        late = asyncio.create_task(one.generate([6], PARAMS, "b"))
        first = await running
        await asyncio.sleep(0.05)
        waiting = not late.done()
        await one.resume_generation()
        second = await late
        await one.abort_all_requests(reject_request=True)
        third = await one.generate([7], PARAMS, "c")
        return ended, first, waiting, second, third

    ended, first, waiting, second, third = run(main())
    assert ended == {"aborted_count": 1, "request_ids": ["a"]}
    assert first.stop_reason == "aborted" and waiting and second.stop_reason in ("completed", "length")
    assert third.stop_reason == "aborted" and third.token_ids == []


def test_module_needs_neither_verl_nor_ray() -> None:
    assert not {"verl", "ray"} & set(vars(generation))
