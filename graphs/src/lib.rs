//! Networks before any target: the IR, the DSL that writes it, the model families, the verifier and the CPU interpreter.
//! No input or output, no TensorRT.
mod config;
mod dtype;
mod error;
pub mod families;
mod infer;
pub mod int8_row;
pub mod interpret;
mod ir;
pub mod models;
mod names;
mod relative;
mod rope;
mod scope;
mod text;
mod verify;
mod weight;
mod window;

pub use dtype::DType;
pub use error::GraphError;
pub use infer::infer;
pub use ir::{
    ActivationKind, Attention, Axis, BinaryKind, Cache, Dim, Mask, Network, Node, NodeId, NormKind, Op, OwnIds, Split,
    Type,
};
pub use models::{Aspect, DecoderFacts, Entry, Facts, Logits, Model, PictureFacts, Positions, VISION_TOWER};
pub use names::{Coverage, cover};
pub use relative::RelativeBias;
pub use rope::{Rope, RopeScaling};
pub use scope::{AttentionLayer, CacheInputs, Graph, Heads, Linear, Scope, Tensor};
pub use text::{parse, print};
pub use verify::verify;
pub use weight::{Format, Weight, group_of_part};
pub use window::WindowBias;
