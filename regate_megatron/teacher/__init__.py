"""The frozen text-only teacher: sharded over the student's ranks, forward-only, one loss per target."""

from regate_megatron.teacher.assemble import TeacherSource, open_reference
from regate_megatron.teacher.build import build_teacher
from regate_megatron.teacher.losses import ReferenceLosses
from regate_megatron.teacher.rows import TeacherRows, rows_for_teacher

__all__ = [
    "ReferenceLosses",
    "TeacherRows",
    "TeacherSource",
    "build_teacher",
    "open_reference",
    "rows_for_teacher",
]
