"""Which process feeds and judges which rows, on meshes of processes that are not here, and on the real ones that are."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pgjax.parallel import batch_rows
from pgjax.parallel.sharding import batch_sharding, make_mesh


def mesh_of(processes, **axes):
    """A mesh of devices that belong to the processes of the given numbers."""
    devices = np.array([SimpleNamespace(process_index=number) for number in processes], object)
    return SimpleNamespace(devices=devices.reshape(*axes.values()), axis_names=tuple(axes), shape=axes)


MESHES = [
    (mesh_of([0, 0, 1, 1], data=4), 2),
    (mesh_of([0, 0, 1, 1], data=2, fsdp=2), 2),
    (mesh_of([0, 1, 0, 1], data=2, fsdp=2), 2),  # neighbours in the mesh on other hosts
    (mesh_of([0, 0, 1, 1], data=2, tensor=2), 2),
    (mesh_of([0, 1, 0, 1], data=2, tensor=2), 2),  # tensor across hosts: both hold every row
    (mesh_of([0, 0, 1, 1], tensor=4), 2),
    (mesh_of([0, 0, 0, 1, 1, 1], data=3, tensor=2), 2),  # one part of three is held by both
    (mesh_of([3, 2, 1, 0], tensor=2, fsdp=2), 4),  # axes in another order
    (mesh_of(range(8), data=2, tensor=4), 8),
    (mesh_of([0], tensor=1), 1),
]


def of_process(monkeypatch, number, rule, mesh, rows):
    monkeypatch.setattr(jax, "process_index", lambda: number)
    return rule(mesh, rows)


@pytest.mark.parametrize("mesh, count", MESHES)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_row_is_judged_once_by_a_process_that_feeds_it(monkeypatch, mesh, count, size):
    rows = size * len(batch_rows.processes_of_parts(mesh))
    judged = [of_process(monkeypatch, i, batch_rows.rows_to_judge, mesh, rows) for i in range(count)]
    fed = [of_process(monkeypatch, i, batch_rows.rows_to_feed, mesh, rows) for i in range(count)]
    assert sorted(row for own in judged for row in own) == list(range(rows))
    assert {row for own in fed for row in own} == set(range(rows))
    for own, held in zip(judged, fed, strict=True):
        assert set(own) <= set(held) and own == sorted(set(own)) and held == sorted(set(held))
    if size == 4 and len({len(own) for own in fed}) == 1:  # processes that hold equally much do equally much
        assert len({len(own) for own in judged}) == 1


def test_rows_by_hand(monkeypatch):
    def found(mesh, rows):
        rules = batch_rows.rows_to_feed, batch_rows.rows_to_judge
        return [[of_process(monkeypatch, i, rule, mesh, rows) for rule in rules] for i in range(2)]

    straight, crossed, spanning = (MESHES[i][0] for i in (1, 2, 4))
    assert found(straight, 8) == [[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2]
    assert found(crossed, 8) == [[[0, 1, 4, 5]] * 2, [[2, 3, 6, 7]] * 2]
    everything = list(range(8))
    assert found(spanning, 8) == [[everything, [0, 1, 4, 5]], [everything, [2, 3, 6, 7]]]


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 2, "data": 2}, {"tensor": 2, "data": 2}, {"tensor": 4}])
@pytest.mark.parametrize("turned", [False, True])
def test_parts_are_where_jax_puts_them(sizes, turned):
    """Of each device, the part of a batch that the sharding gives it is the one that counts it among its holders."""
    mesh = make_mesh(**sizes)
    if turned:
        mesh = Mesh(mesh.devices.T, mesh.axis_names[::-1])
    numbered = SimpleNamespace(
        devices=np.vectorize(lambda device: SimpleNamespace(process_index=device.id), otypes=[object])(mesh.devices),
        axis_names=mesh.axis_names,
    )
    parts = batch_rows.processes_of_parts(numbered)
    where = batch_sharding(mesh).devices_indices_map((len(parts),))
    for device, (index,) in where.items():
        (part,) = range(len(parts))[index]
        assert device.id in parts[part]


def test_a_batch_comes_back_as_it_was_fed():
    mesh = make_mesh(data=2, tensor=2)
    tree = {"x": np.arange(12).reshape(4, 3), "y": np.arange(4.0)}
    for placed in (batch_rows.feed(mesh, tree), batch_rows.feed(None, tree)):
        assert placed["x"].shape == (4, 3) and placed["y"].dtype == jnp.float32
        np.testing.assert_array_equal(batch_rows.local_rows(placed["x"], [3, 1]), tree["x"][[3, 1]])
        assert batch_rows.local_rows(placed["x"], []).shape == (0, 3)
    assert batch_rows.feed(mesh, tree)["x"].sharding == batch_sharding(mesh)


def test_rows_that_do_not_divide_are_refused():
    for rule in (batch_rows.rows_to_feed, batch_rows.rows_to_judge):
        with pytest.raises(ValueError, match="6 rows do not divide over data=4"):
            rule(make_mesh(data=4), 6)
