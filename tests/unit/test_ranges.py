"""A range of a block's layers: whatever the block's forward calls must see these layers alone."""

from __future__ import annotations

from types import SimpleNamespace

from regate_megatron.decoder.ranges import LayerRange


class _Block:
    """Runs its layers through a method of its own, as core 0.17 recomputes."""

    def __init__(self) -> None:
        self.layers, self.config, self.scale = [1, 2, 3, 4], SimpleNamespace(recompute_method=None), 10
        self.forward = lambda: "the hook's, set on the block itself"

    def run(self) -> list[int]:
        return [self.layer(index) * self.scale for index in range(self.num_layers_per_pipeline_rank)]

    def layer(self, index: int) -> int:
        return self.layers[index]


def test_methods_of_the_block_run_over_the_range():
    block = _Block()
    ranges = [LayerRange(block, start, stop, takes_input=True, is_end=stop == 4) for start, stop in ((0, 1), (1, 4))]
    assert [one.run() for one in ranges] == [[10], [20, 30, 40]]
    assert ranges[0].forward is block.forward  # what was put on the block is left as it is
