"""Scoring the 100 class names of CIFAR-100 with SmolVLM-256M's architecture: what the trie costs.

    python tests/benchmarks/trie.py

Random weights, float32, one image of 512 px, one thread.  The tokens of the names are those of CLIP's
byte-pair encoding, as a stand-in for a tokenizer that would have to be downloaded.  Times are of the
process, so other work on the machine counts little; the best of three runs, but for the naive way, which
takes seconds per class: one run of two classes, times 50.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import open_clip
import torch
import transformers

from toolkit.baselines.architectures import configuration
from toolkit.baselines.generative import VisionLanguageModel
from toolkit.baselines.trie import Trie, aggregate, score_trie

PROMPT, IMAGE_TOKENS, IMAGE_TOKEN, TERMINATOR = 97, 64, 49190, 49279
NAIVE_CLASSES = 2
CIFAR100 = """
apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus,
butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab,
crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard,
lamp, lawn mower, leopard, lion, lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom,
oak tree, orange, orchid, otter, palm tree, pear, pickup truck, pine tree, plain, plate, poppy, porcupine,
possum, rabbit, raccoon, ray, road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake,
spider, squirrel, streetcar, sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor,
train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm
"""


def smolvlm_256m() -> VisionLanguageModel:
    torch.manual_seed(0)
    config = configuration("smolvlm_256m")
    model = transformers.Idefics3ForConditionalGeneration(config).eval().requires_grad_(False)
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: TERMINATOR)
    return VisionLanguageModel(model, SimpleNamespace(tokenizer=tokenizer), "idefics3")


def prompt() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49000, (1, PROMPT), generator=generator)
    tokens[:, 8 : 8 + IMAGE_TOKENS] = IMAGE_TOKEN
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(1, 1, 3, 512, 512, generator=generator),
    }


def seconds(run: Callable, runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def score_naive(
    vlm: VisionLanguageModel, inputs: Mapping[str, torch.Tensor], candidates: list[list[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of each candidate's tokens, float32 (B, its length), by one full pass per candidate.

    The slow reference for `score_trie`.
    """
    prefix = inputs["input_ids"]
    tables = []
    for candidate in candidates:
        answer = torch.tensor(candidate, device=prefix.device).expand(len(prefix), -1)
        given = answer[:, :-1]
        whole = dict(inputs) | {"input_ids": torch.cat([prefix, given], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "token_type_ids" in inputs:  # 1: sees what is before it only
            whole["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.ones_like(given)], 1)
        hidden = vlm.hidden(whole).last_hidden_state[:, -answer.shape[1] :]
        total = vlm.logits(hidden).float().logsumexp(-1)
        tables.append(vlm.logits_of(hidden, answer[0]) - total)
    return tables


def main() -> None:
    torch.set_num_threads(1)
    encode = open_clip.tokenizer.SimpleTokenizer().encode
    names = " ".join(CIFAR100.split()).split(", ")
    candidates = [[token % 49000 for token in encode(name)] + [TERMINATOR] for name in names]
    trie, vlm, inputs = Trie(candidates), smolvlm_256m(), prompt()
    print(f"{len(names)} names, {len(trie.tokens) - 1} tokens in the trie, {len(trie.inner)} inner nodes")

    prefill = seconds(lambda: vlm.logits(vlm.hidden(inputs).last_hidden_state[:, -1:]))
    packed = seconds(lambda: aggregate(score_trie(vlm, inputs, trie), trie, "sibling"))
    few = candidates[:NAIVE_CLASSES]
    naive = seconds(lambda: score_naive(vlm, inputs, few), runs=1) * len(names) / NAIVE_CLASSES
    print(f"prefill alone {prefill:7.2f} s per image")
    print(f"trie          {packed:7.2f} s, {packed / prefill:.2f} x prefill")
    print(f"naive         {naive:7.2f} s, {naive / packed:.0f} x trie; {NAIVE_CLASSES} classes extrapolated")

    table = score_trie(vlm, inputs, trie)
    worst = max(
        float((table[0, trie.paths[index, : len(steps[0])]] - steps[0]).abs().max())
        for index, steps in enumerate(score_naive(vlm, inputs, few))
    )
    print(f"largest difference of a log-probability between the two, these classes: {worst:.1e}")


if __name__ == "__main__":
    main()
