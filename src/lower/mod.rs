//! From a network to TensorRT's: one function per op group, named after the node it comes from.
mod attention;
mod capabilities;
mod collectives;
mod constants;
mod layers;
mod linear;
mod profiles;
mod quantize_input;

use capabilities::Capabilities;
pub use constants::{ConstantError, Constants};
pub use profiles::profiles;

use crate::engine_dir::Sizes;
use crate::plugins::{CompileError, Compiler, GreedyPlugin};
use graphs::{DType, Dim, Network, Node, NodeId, Op, Rope, Type};
use std::collections::BTreeMap;
use tensorrt_sys as trt;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum LowerError {
    #[error("layer `{path}`")]
    Layer { path: String, source: trt::Error },
    #[error("layer `{path}`: {reason}")]
    Unsupported { path: String, reason: String },
    #[error(transparent)]
    Constant(#[from] ConstantError),
    #[error("layer `{path}` is a plugin, which needs a compiler")]
    NoCompiler { path: String },
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    TensorRt(#[from] trt::Error),
}

/// A network being written into TensorRT's. `'n` is the TensorRT network's lifetime, `'w` that of the mapped weights.
struct Lowering<'l, 'n, 'w> {
    network: &'l Network,
    target: &'n trt::Network<'w>,
    constants: &'w Constants,
    sizes: Sizes,
    capabilities: Capabilities,
    compiler: Option<&'l Compiler>,
    values: Vec<trt::Tensor<'n>>,
    /// Additive mask `[batch, 1, tokens, rows]` of cached attention, the same in every layer.
    mask: Option<trt::Tensor<'n>>,
    /// Cosines and sines, the same in every layer.
    rotary: Option<(Rope, trt::Tensor<'n>)>,
    /// Of tokens that were divided by their scales before they were quantized.
    token_scales: BTreeMap<NodeId, trt::Tensor<'n>>,
    /// The plugin's bias by distance, by its weight.
    bias: Option<(String, trt::Tensor<'n>)>,
    /// What hides keys beyond the lengths of a node, with a relative bias or without, the same in every layer.
    length_mask: Option<(NodeId, bool, trt::Tensor<'n>)>,
}

/// Writes all nodes and marks the outputs. `compiler` is for targets that need plugins.
///
/// # Errors
/// The first layer that TensorRT refuses, by its path.
pub fn lower<'w>(
    network: &Network,
    target: &trt::Network<'w>,
    constants: &'w Constants,
    sizes: Sizes,
    compiler: Option<&Compiler>,
) -> Result<(), LowerError> {
    let values = Vec::with_capacity(network.nodes.len());
    let capabilities = Capabilities::of(target.family());
    let (mask, rotary, bias, length_mask, token_scales) = (None, None, None, None, BTreeMap::new());
    let mut lowering = Lowering {
        network,
        target,
        constants,
        sizes,
        capabilities,
        compiler,
        values,
        mask,
        rotary,
        token_scales,
        bias,
        length_mask,
    };
    for node in &network.nodes {
        let value = lowering.node(node)?;
        lowering.values.push(value);
    }
    for (name, id) in &network.outputs {
        let value = target.identity(name, lowering.value(*id))?;
        target.mark_output(name, value)?;
        if name == LOGITS && !capabilities.native_attention {
            lowering.choose(value)?;
        }
    }
    Ok(())
}

/// Outputs of a language network's engine.
pub(crate) const LOGITS: &str = "logits";
pub(crate) const NEXT_TOKENS: &str = "next_tokens";
pub(crate) const NEXT_LENGTHS: &str = "next_lengths";

/// Whether engines of a kind can keep keys and values as INT8.
pub fn has_int8_cache(family: trt::Family) -> bool {
    Capabilities::of(family).int8_cache
}

/// TensorRT's name of an element type.
pub(crate) fn data_type(dtype: DType) -> trt::DataType {
    match dtype {
        DType::Float32 => trt::DataType::Float,
        DType::Float16 => trt::DataType::Half,
        DType::Bfloat16 => trt::DataType::Bf16,
        DType::Int32 => trt::DataType::Int32,
        DType::Int64 => trt::DataType::Int64,
        DType::Int8 => trt::DataType::Int8,
        DType::Uint8 => trt::DataType::Uint8,
        DType::Int4 => trt::DataType::Int4,
        DType::Bool => trt::DataType::Bool,
    }
}

/// Dimensions with -1 for the named ones.
fn dims(ty: &Type) -> Vec<i64> {
    ty.shape.iter().map(|dim| dim.fixed().map_or(-1, |size| size as i64)).collect()
}

impl<'n> Lowering<'_, 'n, '_> {
    fn compiler(&self, node: &Node) -> Result<&Compiler, LowerError> {
        self.compiler.ok_or_else(|| LowerError::NoCompiler { path: node.path.clone() })
    }

    /// Adds the greedy choice to a network with caches, so that a decode step can follow the other without the host.
    fn choose(&self, logits: trt::Tensor<'n>) -> Result<(), LowerError> {
        let last = Some(2) == self.target.shape(logits).ok().map(|shape| shape.len());
        let lengths = self.network.nodes.iter().position(|node| node.path == "sequence_lengths");
        let (Some(lengths), true, Some(compiler)) = (lengths, last, self.compiler) else { return Ok(()) };
        let inputs = [logits, self.value(NodeId(lengths))];
        let outputs = self.target.plugin("greedy", &inputs, Box::new(GreedyPlugin::new(compiler)?))?;
        for (name, output) in std::iter::zip([NEXT_TOKENS, NEXT_LENGTHS], outputs) {
            self.target.mark_output(name, output)?;
        }
        Ok(())
    }

    fn value(&self, id: NodeId) -> trt::Tensor<'n> {
        self.values[id.0]
    }

    fn ty(&self, id: NodeId) -> &Type {
        &self.network.nodes[id.0].ty
    }

    fn node(&mut self, node: &Node) -> Result<trt::Tensor<'n>, LowerError> {
        let layer = |source| LowerError::Layer { path: node.path.clone(), source };
        let path = node.path.as_str();
        let input = |place: usize| self.values[node.inputs[place].0];
        match &node.op {
            Op::Input => self.target.input(path, data_type(node.ty.dtype), &dims(&node.ty)).map_err(layer),
            Op::Linear { weight, .. } => self.linear(node, weight),
            Op::Attention(attention) => self.attention(node, attention),
            Op::Norm { kind, weight, bias, epsilon } => self.norm(node, *kind, weight, bias.as_ref(), *epsilon),
            Op::Conv { weight, stride } => self.conv(node, weight, *stride),
            Op::Embed { weight, own, .. } => self.embed(node, weight, own.as_ref()),
            Op::Splice { vocab } => self.splice(node, *vocab),
            Op::Activation { kind } => self.activation(node, *kind),
            Op::BiasAdd { weight } => self.bias_add(node, weight),
            Op::Scale { factor } => {
                let factor = self.number(&format!("{path}/factor"), *factor, node.ty.dtype, node.ty.shape.len())?;
                self.target.elementwise(path, input(0), factor, trt::ElementWiseOperation::Prod).map_err(layer)
            }
            Op::ScaleBy { weight, divide } => {
                let by = self.weight(weight, node.ty.shape.len())?;
                let operation = if *divide { trt::ElementWiseOperation::Div } else { trt::ElementWiseOperation::Prod };
                self.target.elementwise(path, input(0), by, operation).map_err(layer)
            }
            Op::QuantizeInput { scale, wide } => self.quantize_input(node, scale.as_ref(), *wide),
            Op::Largest { rank, ranks } => self.largest(node, *rank, *ranks),
            Op::Broadcast { weight } => self.broadcast(node, weight),
            Op::Binary { kind } => {
                let operation = match kind {
                    graphs::BinaryKind::Add => trt::ElementWiseOperation::Sum,
                    graphs::BinaryKind::Multiply => trt::ElementWiseOperation::Prod,
                };
                self.target.elementwise(path, input(0), input(1), operation).map_err(layer)
            }
            Op::Concat { axis } => {
                let inputs: Vec<_> = node.inputs.iter().map(|id| self.value(*id)).collect();
                self.target.concatenation(path, &inputs, *axis).map_err(layer)
            }
            Op::Slice { axis, start, end } => {
                self.target.slice(path, input(0), *axis, *start, end - start).map_err(layer)
            }
            Op::Pad { axis, after } => self.pad(node, *axis, *after),
            Op::Roll { axis, by } => self.roll(node, *axis, *by),
            Op::Reshape { shape } => {
                let from = &self.ty(node.inputs[0]).shape;
                let size = |(place, dim): (usize, &Dim)| match dim {
                    Dim::Fixed(size) => *size as i64,
                    // 0 takes over the size at the same place.
                    Dim::Named(_) if from.get(place) == Some(dim) => 0,
                    Dim::Named(_) => -1,
                };
                let shape: Vec<i64> = shape.iter().enumerate().map(size).collect();
                self.target.reshape(path, input(0), &shape).map_err(layer)
            }
            Op::Transpose { permutation } => self.target.transpose(path, input(0), permutation).map_err(layer),
            Op::LastToken => self.target.gather_batched(path, input(0), input(1), 1, 1).map_err(layer),
            Op::AllReduce { ranks } => self.all_reduce(node, *ranks),
            Op::AllGather { ranks } => self.all_gather(node, *ranks),
            Op::Cast { dtype } => self.target.cast(path, input(0), data_type(*dtype)).map_err(layer),
        }
    }
}
