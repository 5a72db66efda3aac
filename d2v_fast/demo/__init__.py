"""One command from nothing to a pretrained model: data, training, probe and report (``python -m d2v_fast.demo``)."""
