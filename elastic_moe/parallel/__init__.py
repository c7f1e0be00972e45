"""Expert parallelism, FSDP2 and HSDP for the decoder, from a `launcher.rounds.mesh.MeshPlan`.

    meshes = build_mesh(plan, device)
    with torch.device("meta"):
        model = Decoder(config)
    parallelize(model, meshes)
    materialize(model, device)
    init_weights(model, seed=0)

A world of one rank runs through the same code. Every parameter is then a DTensor of the model's full shape, so a
checkpoint says which part of which tensor it holds, and any other mesh can load it.
"""

from elastic_moe.parallel.apply import Precision, parallelize
from elastic_moe.parallel.gradients import begin_round, clip_gradients
from elastic_moe.parallel.meshes import Meshes, build_mesh
from elastic_moe.parallel.sharing import Shared, take_shared
from elastic_moe.parallel.turns import expect_first_step
from elastic_moe.parallel.weights import gather_full, init_weights, materialize, read_weights

__all__ = [
    "Meshes",
    "Precision",
    "Shared",
    "begin_round",
    "build_mesh",
    "clip_gradients",
    "expect_first_step",
    "gather_full",
    "init_weights",
    "materialize",
    "parallelize",
    "read_weights",
    "take_shared",
]
