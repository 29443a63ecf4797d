//! The folders of fixtures/peers that hold a quantized checkpoint.
pub(crate) const PEERS: [&str; 6] = [
    "autoawq-gemm-g128-asymmetric",
    "compressed-tensors-w4a16-g128",
    "compressed-tensors-w8a8-dynamic",
    "gptq-g64-asymmetric",
    "unified-w4a16-awq",
    "unified-w8a8-sq",
];
