"""The mathematics of one model replica, on megatron-core's tensor-parallel layers."""
