"""A folder that ``d2v-fast run`` puts in front of PYTHONPATH; nothing else imports it."""
