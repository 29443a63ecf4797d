//! The CPU interpreter: the oracle of every target, and the way to run without a GPU.
//!
//! It computes in f32 whatever the network's type is, one arm per op, and reads quantized weights as an engine would:
//! dequantized, then multiplied.
mod array;
mod attention;
mod collective;
mod kernels;
mod matmul;
mod sweep;

use crate::{Axis, Cache, DType, Dim, Network, Node, NodeId, Op, Weight};
pub use array::{Array, Data};
use attention::Bias;
pub use collective::{Collective, Group, Member};
pub use kernels::{ROUNDER, nearest, round_tokens};
pub use matmul::multiply;
use rayon::prelude::*;
use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
pub use sweep::{Seen, compute, sizes, sweep};
use thiserror::Error;

/// Where weights come from; values are dequantized, row-major, of the weight's logical shape.
pub trait Values: Sync {
    /// # Errors
    /// Whatever keeps the weight from being read.
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;
}

#[derive(Debug, Error)]
pub enum InterpretError {
    #[error("weight of `{path}`: {source}")]
    Weight { path: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("weight of `{path}`: wanted {wanted} values, found {found}")]
    WeightSize { path: String, wanted: usize, found: usize },
    #[error("input `{name}`: wanted {wanted}, found {found}")]
    Input { name: String, wanted: String, found: String },
    #[error("`{path}`: {reason}")]
    Node { path: String, reason: String },
}

/// Keys and values of earlier tokens, `[batch, kv_heads, rows, head_dim]` per slot.
pub struct Caches {
    slots: HashMap<usize, Slot>,
    batch: usize,
    rows: usize,
}

struct Slot {
    shape: Cache,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Caches {
    /// Empty caches for `batch` requests of at most `rows` tokens each.
    pub fn new(network: &Network, batch: usize, rows: usize) -> Caches {
        let slot = |shape: Cache| {
            let size = batch * shape.kv_heads * rows * shape.head_dim;
            (shape.slot, Slot { shape, keys: vec![0.0; size], values: vec![0.0; size] })
        };
        Caches { slots: network.caches().into_iter().map(slot).collect(), batch, rows }
    }

    /// The empty cache of one attention layer alone.
    fn of(node: &Node, batch: usize, rows: usize) -> Caches {
        let nodes = vec![node.clone()];
        Caches::new(&Network { name: String::new(), dtype: node.ty.dtype, nodes, outputs: Vec::new() }, batch, rows)
    }
}

/// Sees each node's result as it is computed.
pub type Tap<'t> = &'t mut dyn FnMut(&Node, &Array);

/// A network with its weights in memory.
pub struct Interpreter {
    network: Network,
    weights: Weights,
    /// For each node the position of its last reader, after which its value is dropped.
    last_use: Vec<usize>,
    /// The ranks that a divided network works with.
    collective: Option<Arc<dyn Collective>>,
    /// Each result is rounded to its node's type.
    rounded: bool,
}

impl Interpreter {
    /// Reads every weight once, tied ones shared.
    ///
    /// # Errors
    /// The first weight that cannot be read or has the wrong size.
    pub fn new(network: Network, source: &dyn Values) -> Result<Interpreter, InterpretError> {
        let weights = Weights::load(network.weights(), source)?;
        let last_use = network.last_use();
        Ok(Interpreter { network, weights, last_use, collective: None, rounded: false })
    }

    /// For one rank of a divided network: the others run at the same time, each in its thread.
    pub fn with_collective(mut self, collective: Arc<dyn Collective>) -> Interpreter {
        self.collective = Some(collective);
        self
    }

    /// Rounds each result to the type that its node has, float32 to fewer bits than it has: what an engine of that type must
    /// differ by at the least.
    pub fn rounded(mut self) -> Interpreter {
        self.rounded = true;
        self
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Runs the network once; caches are read and appended to in place.
    ///
    /// # Errors
    /// An input that is missing or does not fit, or a node whose values do not (an id outside the table, a full cache).
    pub fn run<K: Borrow<str> + Ord>(
        &self,
        inputs: &BTreeMap<K, Array>,
        caches: &mut Caches,
        mut tap: Option<Tap<'_>>,
    ) -> Result<BTreeMap<String, Array>, InterpretError> {
        let axes = bind(&self.network, inputs)?;
        let mut values: Vec<Option<Array>> = Vec::with_capacity(self.network.nodes.len());
        for (position, node) in self.network.nodes.iter().enumerate() {
            let value = match &node.op {
                Op::Input => inputs.get(node.path.as_str()).cloned(),
                _ => {
                    let found = node.inputs.iter().map(|id| values[id.0].as_ref()).collect::<Option<Vec<&Array>>>();
                    let found = found.ok_or_else(|| fail(node, "an input was dropped too early".into()))?;
                    Some(self.node(node, &found, &axes, caches).map_err(|reason| fail(node, reason))?)
                }
            };
            let value = if self.rounded { value.map(|value| value.rounded(node.ty.dtype)) } else { value };
            if let (Some(tap), Some(value)) = (&mut tap, &value) {
                tap(node, value);
            }
            values.push(value);
            for input in &node.inputs {
                if self.last_use[input.0] == position {
                    values[input.0] = None;
                }
            }
        }
        let output = |(name, id): &(String, NodeId)| values[id.0].clone().map(|value| (name.clone(), value));
        Ok(self.network.outputs.iter().filter_map(output).collect())
    }

    fn node(
        &self,
        node: &Node,
        inputs: &[&Array],
        axes: &HashMap<Axis, usize>,
        caches: &mut Caches,
    ) -> Result<Array, String> {
        match (&node.op, self.collective.as_deref()) {
            (Op::AllReduce { .. }, Some(collective)) => {
                let mut data = inputs[0].floats()?.to_vec();
                collective.all_reduce(&mut data)?;
                Ok(Array::float(inputs[0].shape.clone(), data))
            }
            (Op::AllGather { .. }, Some(collective)) => {
                kernels::beside(inputs[0], &collective.all_gather(inputs[0].floats()?)?)
            }
            _ => self.weights.evaluate(node, inputs, axes, caches),
        }
    }
}

/// Sizes of the named dimensions, taken from the inputs, which must agree.
fn bind<K: Borrow<str> + Ord>(
    network: &Network,
    inputs: &BTreeMap<K, Array>,
) -> Result<HashMap<Axis, usize>, InterpretError> {
    let mut axes = HashMap::new();
    for node in network.inputs() {
        let wrong =
            |found: String| InterpretError::Input { name: node.path.clone(), wanted: node.ty.to_string(), found };
        let array = inputs.get(node.path.as_str()).ok_or_else(|| wrong("nothing".into()))?;
        let shape = &array.shape;
        let fits = node.ty.shape.len() == shape.len()
            && array.len() == shape.iter().product::<usize>()
            && matches!((&array.data, node.ty.dtype), (Data::Int(_), DType::Int32) | (Data::Float(_), _))
            && std::iter::zip(&node.ty.shape, shape).all(|(dim, &size)| match dim {
                Dim::Fixed(wanted) => *wanted == size,
                Dim::Named(axis) => *axes.entry(*axis).or_insert(size) == size,
            });
        if !fits {
            return Err(wrong(format!("{shape:?} with {axes:?}")));
        }
    }
    Ok(axes)
}

/// Weights in memory, by key.
struct Weights(HashMap<String, Arc<[f32]>>);

impl Weights {
    /// Reads every weight once, equal ones shared.
    fn load<'n>(
        weights: impl Iterator<Item = (&'n Node, &'n Weight)>,
        source: &dyn Values,
    ) -> Result<Weights, InterpretError> {
        let wanted: BTreeMap<String, _> = weights.map(|(node, weight)| (weight.key(), (node, weight))).collect();
        let loaded = wanted
            .into_par_iter()
            .map(|(key, (node, weight))| {
                let path = || node.path.clone();
                let values = source.values(weight).map_err(|source| InterpretError::Weight { path: path(), source })?;
                if values.len() != weight.count() {
                    let (wanted, found) = (weight.count(), values.len());
                    return Err(InterpretError::WeightSize { path: path(), wanted, found });
                }
                Ok((key, values.into()))
            })
            .collect::<Result<_, _>>()?;
        Ok(Weights(loaded))
    }

    fn weight(&self, weight: &Weight) -> Result<&[f32], String> {
        self.0.get(&weight.key()).map(|values| &values[..]).ok_or_else(|| "its weight is not loaded".into())
    }

    fn evaluate(
        &self,
        node: &Node,
        inputs: &[&Array],
        axes: &HashMap<Axis, usize>,
        caches: &mut Caches,
    ) -> Result<Array, String> {
        let x = inputs[0];
        match &node.op {
            Op::Input => Err("an input is not computed".into()),
            Op::Linear { weight, .. } => {
                let shape = weight.shape();
                kernels::linear(x, self.weight(weight)?, shape[0], shape[1])
            }
            Op::BiasAdd { weight } => kernels::bias_add(x, self.weight(weight)?),
            Op::Norm { kind, weight, bias, epsilon } => {
                let bias = bias.as_ref().map(|bias| self.weight(bias)).transpose()?;
                kernels::norm(x, *kind, self.weight(weight)?, bias, *epsilon)
            }
            Op::Activation { kind } => kernels::activation(x, *kind),
            Op::Scale { factor } => kernels::scale(x, *factor),
            Op::ScaleBy { weight, divide } => kernels::scale_by(x, self.weight(weight)?, *divide),
            Op::QuantizeInput { scale, wide } => {
                let scale = scale.as_ref().map(|scale| self.weight(scale)).transpose()?;
                let most = inputs.get(1).map(|most| most.floats()).transpose()?;
                kernels::quantize_input(x, scale.and_then(|scale| scale.first().copied()), most, *wide)
            }
            Op::Largest { rank, ranks } => kernels::largest(x, *rank, *ranks),
            Op::Binary { kind } => kernels::binary(x, inputs[1], *kind),
            Op::Attention(attention) => {
                let bias = match (&attention.relative_bias, &attention.window_bias) {
                    (Some(bias), _) => Bias::Distance(bias, self.weight(&bias.weight)?),
                    (None, Some(bias)) => Bias::Window(bias, self.weight(&bias.weight)?),
                    (None, None) => Bias::None,
                };
                match attention.cache {
                    None => attention::plain(attention, inputs, bias),
                    Some(slot) => {
                        let (batch, rows) = (caches.batch, caches.rows);
                        let slot = caches.slots.get_mut(&slot).ok_or("its cache was not made")?;
                        attention::cached(attention, inputs, slot, (batch, rows), bias)
                    }
                }
            }
            Op::Conv { weight, stride } => kernels::conv(x, self.weight(weight)?, &weight.shape(), *stride),
            Op::Embed { weight, own, .. } => kernels::embed(x, self.weight(weight)?, &weight.shape(), own.as_ref()),
            Op::Splice { vocab } => kernels::splice(x, inputs[1], inputs[2], *vocab),
            Op::Broadcast { weight } => kernels::broadcast(x, self.weight(weight)?, &weight.shape()),
            Op::Concat { axis } => kernels::concat(inputs, *axis),
            Op::Slice { axis, start, end } => kernels::slice(x, *axis, *start, *end),
            Op::Pad { axis, after } => kernels::pad(x, *axis, *after),
            Op::Roll { axis, by } => kernels::roll(x, *axis, *by),
            Op::Reshape { shape } => {
                let size = |dim: &Dim| match dim {
                    Dim::Fixed(size) => Ok(*size),
                    Dim::Named(axis) => axes.get(axis).copied().ok_or(format!("no input has axis {}", axis.name())),
                };
                let shape = shape.iter().map(size).collect::<Result<Vec<_>, _>>()?;
                Ok(Array { shape, data: x.data.clone() })
            }
            Op::Transpose { permutation } => kernels::transpose(x, permutation),
            Op::LastToken => kernels::last_token(x, inputs[1]),
            Op::Cast { .. } => Ok(x.clone()),
            Op::AllReduce { .. } | Op::AllGather { .. } => {
                Err("it is one rank of several, the others do not run".into())
            }
        }
    }
}

fn fail(node: &Node, reason: String) -> InterpretError {
    InterpretError::Node { path: node.path.clone(), reason }
}
