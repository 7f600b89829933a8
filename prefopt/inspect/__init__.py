"""A row under the microscope: what the model reads of it, what is scored, what counts, and what training did to it."""
