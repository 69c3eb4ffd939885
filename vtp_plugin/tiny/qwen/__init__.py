"""`vtp-tiny-qwen`: the embedded model as Qwen2-VL, with a tower and a merger of its own."""
