"""E3VA: begins as `linear`, learns with all its adapters, and leaves the trunk out of the backward pass."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.backbones.dense import build_dense
from toolkit.budget.plan import Planner
from toolkit.errors import InputError
from toolkit.methods import set_train_mode, summarize

PIXELS = 32


def build(method, head="fpn"):
    toolkit.seed_everything(0)
    task = "segmentation" if head == "fpn" else "detection"
    return toolkit.adapt(build_dense("demo_swin", head, 5, False, task, PIXELS), method)


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, PIXELS, PIXELS, generator=generator)
    return x, torch.randint(0, 5, (2, PIXELS, PIXELS), generator=generator)


def trained(count=3):
    """A model after some steps, so that no adapter is at its start."""
    model, (x, y) = build("e3va"), batch()
    set_train_mode(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_it_begins_as_linear_bit_for_bit_with_the_same_head():
    (x, _), models = batch(), (build("linear"), build("e3va"))
    assert torch.equal(*(model.eval()(x) for model in models))
    assert models[0].head.state_dict().keys() == models[1].head.state_dict().keys()


def test_the_highway_is_added_to_each_map_and_nothing_to_the_trunk():
    model, (x, _) = trained(), batch()
    fresh = build("linear")
    assert all(torch.equal(p, q) for p, q in zip(model.trunk.parameters(), fresh.trunk.parameters()))
    added = [ours - theirs for ours, theirs in zip(model.maps(x), fresh.maps(x))]
    assert all(h.abs().max() > 1e-4 for h in added)


def test_the_highway_is_what_the_docstring_says():
    """By hand: a and m from the parts of a block, h from products of the adapters' matrices."""
    model, (x, _) = trained(), batch()

    def change(adapter, z):
        p1, q1, _, p2, q2 = adapter
        middle = F.gelu(z @ p1.weight.T @ q1.weight.T + q1.bias)
        return middle @ p2.weight.T @ q2.weight.T + q2.bias

    with torch.no_grad():
        z, h = model.trunk.patch_embed(x), 0.0
        for stage, adapters, found in zip(model.trunk.layers, model.highway, model.maps(x)):
            if not isinstance(stage.downsample, nn.Identity):
                h, z = stage.downsample(z + h) - stage.downsample(z), stage.downsample(z)
            for block, (first, second) in zip(stage.blocks, adapters):
                a = block._attn(block.norm1(z))
                m = block.mlp(block.norm2(z + a))
                h, z = h + change(first, a) + change(second, m), z + a + m
            torch.testing.assert_close(found, z + h, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["fpn", "retinanet"])
def test_every_adapter_and_the_head_get_gradients_within_two_steps_and_the_trunk_none(head):
    model, (x, y) = build("e3va", head), batch()
    set_train_mode(model)
    targets = {"boxes": torch.tensor([[[4.0, 4, 20, 20, 1]]]).repeat(2, 1, 1)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    moved = set()
    for _ in range(2):
        loss = F.cross_entropy(model(x), y) if head == "fpn" else sum(model(x, targets).values())
        loss.backward()
        moved |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == {n for n, _ in model.named_parameters() if not n.startswith("trunk.")}
    assert moved == set(summarize(model).names)


def test_backward_keeps_nothing_of_a_block_but_what_its_two_branches_give():
    """No weight of a block, no tensor of its inside; of the trunk only the merging's weights, inherited."""
    model, (x, y) = build("e3va"), batch()
    set_train_mode(model)
    places = {p.data_ptr(): name for name, p in model.trunk.named_parameters()}
    inside, given, saved = [], [], []  # tensors, held so that no other one takes their place in memory
    for block in itertools.chain.from_iterable(stage.blocks for stage in model.trunk.layers):
        for part in block.modules():
            kept = given if part in (block.drop_path1, block.drop_path2) else inside
            part.register_forward_hook(lambda _module, _inputs, out, kept=kept: kept.append(out))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.cross_entropy(model(x), y)
    of_trunk = {places[t.data_ptr()] for t in saved if t.data_ptr() in places}
    assert of_trunk and all(".downsample." in name for name in of_trunk)
    ours, theirs, known = ({t.untyped_storage().data_ptr() for t in ts} for ts in (given, inside, saved))
    assert ours <= known and not known & (theirs - ours)
    assert not any(t.requires_grad for t in given + inside)


def test_the_trunk_stays_in_evaluation_mode():
    model = build("e3va").train()
    assert model.training and model.head.training and model.highway.training
    assert not any(module.training for module in model.trunk.modules())


def test_slices_of_a_blocks_batch_change_nothing():
    """As plans run blocks."""
    model, (x, _) = trained(), batch()
    block = model.trunk.layers[0].blocks[1]
    before, forward = model.maps(x), block.forward
    block.forward = lambda z: torch.cat([forward(part) for part in z.chunk(2)])
    for ours, theirs in zip(model.maps(x), before):
        torch.testing.assert_close(ours, theirs)


def test_less_than_five_percent_of_swin_tiny_trains():
    with torch.device("meta"):
        dense = build_dense("swin_tiny_patch4_window7_224", "fpn", 21, False, "segmentation")
        sizes = summarize(toolkit.adapt(dense, "e3va"))
    assert 0.01 < sizes.trainable / sizes.total < 0.05
    # Both factors of both projections, and biases: 2 (d r + r d / 8) + d / 8 + d for each of 24 adapters.
    widths = [96] * 4 + [192] * 4 + [384] * 12 + [768] * 4
    expected = sum(2 * (8 * d + 8 * d // 8) + d // 8 + d for d in widths)
    assert sizes.trainable - sum(p.numel() for p in dense.head.parameters()) == expected


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("demo_vit", {}, "'e3va' adapts dense models on Swin transformers, not VisionTransformer"),
        ("dense", {"reduction": 25}, "reduction 25 .* 24 channels .* choose 1 to 24"),
        ("dense", {"rank": 0}, "rank must lie between"),
    ],
)
def test_what_it_cannot_adapt_is_said(model, options, message):
    if model == "dense":
        built = build_dense("demo_swin", "fpn", 5, False, "segmentation")
    else:
        built = toolkit.build_backbone(model, 5, pretrained=False)
    with pytest.raises(InputError, match=message):
        toolkit.adapt(built, "e3va", **options)
    assert all(p.requires_grad for p in built.parameters())


def test_every_budget_above_the_smallest_has_a_plan():
    """The highway is no chain: what the planner assumes of a plan's peak is too little, and it searches."""
    model = toolkit.adapt(build_dense("demo_swin", "fpn", 7, False, "segmentation", 64), "e3va")
    set_train_mode(model)
    images, masks = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    chain = Planner(model, (images, masks)).chain(2, True)
    smallest, largest = chain.smallest_peak(), chain.solve(1 << 50).peak_bytes
    for budget in range(smallest, largest, (largest - smallest) // 60):
        assert chain.solve(budget).peak_bytes <= budget
