"""The method: the teacher writes, students learn, improvement is measured, the teacher learns."""
