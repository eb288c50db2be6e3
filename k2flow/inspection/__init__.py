"""What the audit, reprocessing, status and reports share: pinned tables, their files and rows, and the topic."""
