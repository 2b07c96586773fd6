"""Own decode attention in CUDA C++, rotary embedding and cache write included: plan, kernel, and what a step calls."""
