//! Many samples through a network node by node: all of them pass a node before the next one's weights are read, so that
//! memory holds one node's weights and the live values of the samples, never the whole model.
use super::{Array, Caches, InterpretError, Values, Weights, bind, fail};
use crate::{Axis, Network, Node, Op};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};

/// One node about to be computed for one sample.
pub struct Seen<'s> {
    /// Its place in the network.
    pub position: usize,
    pub node: &'s Node,
    pub sample: usize,
    pub inputs: &'s [&'s Array],
}

struct Sample {
    inputs: BTreeMap<String, Array>,
    axes: HashMap<Axis, usize>,
    values: Vec<Option<Array>>,
}

/// Gives each sample's outputs; `see` is told of every node and sample, in order. Caches start empty.
///
/// # Errors
/// As [`super::Interpreter::new`] and [`super::Interpreter::run`].
pub fn sweep(
    network: &Network,
    source: &dyn Values,
    samples: Vec<BTreeMap<String, Array>>,
    see: &mut dyn FnMut(Seen<'_>),
) -> Result<Vec<BTreeMap<String, Array>>, InterpretError> {
    let last_use = network.last_use();
    let sample = |inputs: BTreeMap<String, Array>| {
        let values = Vec::with_capacity(network.nodes.len());
        Ok(Sample { axes: bind(network, &inputs)?, inputs, values })
    };
    let mut samples = samples.into_iter().map(sample).collect::<Result<Vec<_>, InterpretError>>()?;
    for (position, node) in network.nodes.iter().enumerate() {
        for (number, sample) in samples.iter().enumerate() {
            see(Seen { position, node, sample: number, inputs: &sample.read(node)? });
        }
        let weights = Weights::load(node.op.weights().into_iter().map(|weight| (node, weight)), source)?;
        samples.par_iter_mut().try_for_each(|sample| {
            let value = sample.value(node, &weights)?;
            sample.values.push(value);
            for input in node.inputs.iter().filter(|input| last_use[input.0] == position) {
                sample.values[input.0] = None;
            }
            Ok(())
        })?;
    }
    let outputs = |sample: Sample| {
        let output = |(name, id): &(String, crate::NodeId)| Some((name.clone(), sample.values[id.0].clone()?));
        network.outputs.iter().filter_map(output).collect()
    };
    Ok(samples.into_iter().map(outputs).collect())
}

impl Sample {
    /// What a node reads.
    fn read(&self, node: &Node) -> Result<Vec<&Array>, InterpretError> {
        let found = node.inputs.iter().map(|id| self.values[id.0].as_ref()).collect::<Option<_>>();
        found.ok_or_else(|| fail(node, "an input was dropped too early".into()))
    }

    fn value(&mut self, node: &Node, weights: &Weights) -> Result<Option<Array>, InterpretError> {
        if node.op == Op::Input {
            return Ok(self.inputs.remove(&node.path));
        }
        one(node, weights, &self.read(node)?, &self.axes).map(Some)
    }
}

/// Computes one node, which is no input, for one sample.
fn one(
    node: &Node,
    weights: &Weights,
    inputs: &[&Array],
    axes: &HashMap<Axis, usize>,
) -> Result<Array, InterpretError> {
    let size = |axis| axes.get(&axis).copied().unwrap_or(0);
    let mut caches = Caches::of(node, size(Axis::Batch), size(Axis::Tokens));
    weights.evaluate(node, inputs, axes, &mut caches).map_err(|reason| fail(node, reason))
}

/// Sizes of a sample's named dimensions, by its network inputs.
///
/// # Errors
/// As [`super::Interpreter::run`] for inputs that do not fit.
pub fn sizes(network: &Network, inputs: &BTreeMap<String, Array>) -> Result<HashMap<Axis, usize>, InterpretError> {
    bind(network, inputs)
}

/// Computes one node, which is no input, for several samples beside each other; caches start empty. For whoever computes
/// the other nodes elsewhere.
///
/// # Errors
/// A weight that cannot be read, or inputs that do not fit the node.
pub fn compute(
    node: &Node,
    source: &dyn Values,
    samples: &[(&HashMap<Axis, usize>, Vec<&Array>)],
) -> Result<Vec<Array>, InterpretError> {
    let weights = Weights::load(node.op.weights().into_iter().map(|weight| (node, weight)), source)?;
    samples.par_iter().map(|(axes, inputs)| one(node, &weights, inputs, axes)).collect()
}
