"""Items and levels over four devices of two processes: the numbers of one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import lmmjax as lmm

#: run by each process; Dyestuff with 10 simulated responses
PROGRAM = """
import json, sys
import jax
jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[1]))
import test_sharding
mesh = jax.make_mesh((4,), ("item",))
made, model = test_sharding.batch_and_model(mesh)
fit = model.fit(mesh=mesh)
print(json.dumps({
    "loglik": made.loglik.tolist(),
    "df": made.coef_table()["df"].tolist(),
    "deviance": fit.deviance,
    "theta": fit.theta.tolist(),
    "table": fit.coef_table().to_numpy().tolist(),
    "devices": jax.device_count(),
}))
"""


def batch_and_model(mesh: object = None) -> tuple[lmm.BatchFit, lmm.Model]:
    data = lmm.load_dataset("Dyestuff")
    rng = np.random.default_rng(0)
    Y = rng.standard_normal((30, 10)) + np.repeat(rng.standard_normal((6, 10)), 5, axis=0)
    formula = "~ 1 + (1 | Batch)"
    return lmm.fit_many(formula, data, Y, mesh=mesh), lmm.Model(f"Yield {formula}", data)


def test_two_processes_find_the_numbers_of_one() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join(["tests", ".", os.environ.get("PYTHONPATH", "")]),
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port],
            env=env,
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], ends[0][1][-2000:]
    found = [json.loads(out.strip().splitlines()[-1]) for out, _ in ends]
    assert found[0] == found[1]
    assert found[0]["devices"] == 4
    made, model = batch_and_model()
    np.testing.assert_allclose(found[0]["loglik"], made.loglik, atol=1e-10)
    np.testing.assert_allclose(found[0]["df"], made.coef_table()["df"], rtol=1e-8)
    fit = model.fit()
    assert abs(found[0]["deviance"] - fit.deviance) < 1e-10 * abs(fit.deviance)
    np.testing.assert_allclose(found[0]["theta"], fit.theta, rtol=1e-8)
    np.testing.assert_allclose(found[0]["table"], fit.coef_table(), rtol=1e-8)


def test_one_fit_over_a_mesh_of_one_process() -> None:
    """Slopes whose 18 subjects are padded to the devices there are; what a mesh does not do."""
    data = lmm.load_dataset("sleepstudy")
    mesh = jax.make_mesh((jax.device_count(),), ("group",))
    model = lmm.Model("Reaction ~ Days + (Days | Subject)", data)
    one, shared = model.fit(), model.fit(mesh=mesh)
    assert abs(shared.deviance - one.deviance) < 1e-10 * one.deviance
    np.testing.assert_allclose(shared.theta, one.theta, rtol=1e-7)
    np.testing.assert_allclose(shared.coef_table(), one.coef_table(), rtol=1e-7)
    with pytest.raises(lmm.LmmError, match="expected a jax"):
        model.fit(mesh=4)
    ar1 = lmm.Model("Reaction ~ Days", data, residual="ar1(Days | Subject)")
    with pytest.raises(lmm.LmmError, match="found mesh= with the residual structure"):
        ar1.fit(mesh=mesh)
