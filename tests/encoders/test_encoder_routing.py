"""Statistics of the routing in encoders, and the picture of a picture's patches."""

import pytest
import torch
from tiny_encoders import TINY

from mhmoe.evaluation import PatchRouting, RoutingRecorder, save_patch_figure


def test_counts_leave_out_padding():
    tiny = TINY["bert"]
    model = tiny.make()
    inputs = tiny.inputs()
    with RoutingRecorder(model) as recorder:
        counts = recorder.new_counts()
        model(**inputs)
        counts.add(recorder.chosen, inputs["attention_mask"])
    assert counts.layers == [0, 1]
    assert counts.counts.shape == (2, 6)
    assert counts.num_tokens == 10
    assert counts.counts.sum(dim=1).tolist() == [10 * 4 * 2] * 2
    logits = model(**inputs, output_router_logits=True).router_logits[:4]  # of the first layer
    kept = inputs["attention_mask"].bool().flatten()
    expected = torch.cat([head[kept].topk(2).indices.flatten() for head in logits]).bincount(minlength=6)
    assert counts.counts[0].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2", "modernbert", "vilt-vqa", "yolos"])
def test_every_layer_is_found(name):
    model = TINY[name].make(mlp_only_layers=[0])
    assert RoutingRecorder(model).layers == [1]


def test_of_several_encoders_one_is_recorded():
    model = TINY["clip"].make()
    with pytest.raises(ValueError, match="several encoders; record one, such as"):
        RoutingRecorder(model)
    with RoutingRecorder(model.vision_model) as recorder:
        model(**TINY["clip"].inputs())
        assert [len(chosen) for chosen in recorder.chosen] == [2 * 5 * 4] * 2


FIRST_PATCH = {"vit": 1, "deit": 2, "dinov2_with_registers": 5, "dinov3_vit": 2, "yolos": 1}


class TestPatches:
    @pytest.mark.parametrize(("name", "first"), FIRST_PATCH.items())
    def test_patches_without_the_other_tokens(self, name, first):
        tiny = TINY[name]
        model = tiny.make()
        pixel_values = torch.randn(1, 3, 8, 8)
        routing = PatchRouting(model, pixel_values, layer=0)
        assert routing.chosen.shape == (2, 2, 4, 2)
        logits = torch.stack(model(pixel_values, output_router_logits=True).router_logits[:4], dim=1)  # (T, h, E)
        expected = logits[first : first + 4].topk(2).indices
        assert torch.equal(routing.chosen.flatten(0, 1), expected)
        assert routing.reached.flatten().tolist() == [len(set(patch.flatten().tolist())) for patch in expected]

    def test_of_a_tower(self):
        routing = PatchRouting(TINY["siglip"].make().vision_model, torch.randn(1, 3, 8, 8))
        assert (routing.layer, routing.num_experts) == (1, 6)

    def test_a_picture_is_written(self, tmp_path):
        routing = PatchRouting(TINY["vit"].make(), torch.randn(1, 3, 8, 8))
        save_patch_figure(routing, torch.rand(8, 8, 3), tmp_path / "patches.png")
        assert (tmp_path / "patches.png").read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.parametrize("name", ["bert", "vilt", "clip"])
    def test_what_has_no_patches_to_draw(self, name):
        with pytest.raises(ValueError, match=r"model: a mhmoe_\w+ has no patches"):
            PatchRouting(TINY[name].make(), torch.randn(1, 3, 8, 8))

    def test_no_such_layer(self):
        with pytest.raises(ValueError, match="layer=2: there are 2"):
            PatchRouting(TINY["vit"].make(), torch.randn(1, 3, 8, 8), layer=2)
