"""Before any weight is read: what was asked becomes a job, or is refused."""
