"""The protocol: which questions are asked, in which order, and how long each may take."""

from mlx_mtp.report.acceptance import acceptance, other_targets
from mlx_mtp.report.activations import activations, formats
from mlx_mtp.report.costs import cost_curve, speeds
from mlx_mtp.report.donation import donation
from mlx_mtp.report.experts import expert_overlap
from mlx_mtp.report.footprint import memory
from mlx_mtp.report.here import exactness, machine
from mlx_mtp.report.kernels import kernels, matrix_order
from mlx_mtp.report.overlap import overlap
from mlx_mtp.report.position import drafter_position
from mlx_mtp.report.products import dtype_times
from mlx_mtp.report.protocol import Section
from mlx_mtp.report.published import published

# What needs no model comes first: it survives whatever the device does later. Memory comes before anything else has
# grown the process.
SECTIONS = (
    Section("machine", "What was this run on?", 10, machine, needs_pair=False),
    Section("published", "Are the published files as we expect them?", 85, published, needs_pair=False),
    Section("matrix_order", "In which order does a matrix unit add?", 50, matrix_order, needs_pair=False),
    Section("memory", "Does the estimate cover what MLX and the process take?", 75, memory),
    Section("exactness", "Is a row computed alike in passes of every size?", 45, exactness),
    Section("donation", "Does a round write its K/V in place?", 45, donation),
    Section("overlap", "Is the next round built while this one runs?", 30, overlap),
    Section("position", "Are more drafts kept at position P or at P - 1?", 80, drafter_position),
    Section("acceptance", "How many drafts are kept at 16, 8 and 4 bits of the drafter?", 110, acceptance),
    Section("other_targets", "And with the other precisions of the target?", 60, other_targets),
    Section("cost_curve", "What does a pass of 1 to 9 rows cost, and a draft?", 80, cost_curve),
    Section("speeds", "How many tokens a second, plain and with drafts?", 90, speeds),
    Section("kernels", "Are our kernels right here, and faster than stock MLX?", 200, kernels),
    Section("dtypes", "Which number format does this chip compute fast?", 60, dtype_times),
    Section("formats", "Does the target say the same in other number formats?", 30, formats),
    Section("activations", "Do activations fit into float16?", 30, activations),
    Section("experts", "How many distinct experts does a pass of several rows need?", 40, expert_overlap),
)
