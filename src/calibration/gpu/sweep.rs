//! Samples through a network node by node on a GPU, as `graphs::interpret::sweep` does on the CPU.
use super::machine::{Floats, Heads, Machine, Matrix, Request};
use super::value::Value;
use crate::source::{CheckpointValues, ModelSource};
use crate::teach::Arrays;
use graphs::interpret::{Array, InterpretError, compute, sizes};
use graphs::{Attention, Axis, DType, Dim, Mask, Network, Node, NodeId, Op, Weight};
use quant::Stored;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, sync_channel};

type Result<T> = std::result::Result<T, String>;

/// Nodes whose weights are read before they are needed.
const AHEAD: usize = 2;

/// Told of each node before it is computed, with its place and its first input.
pub(in crate::calibration) type See<'s> = dyn FnMut(usize, &Node, Option<&Value>) -> Result<()> + 's;

/// Gives each sample's outputs. Caches start empty.
///
/// # Errors
/// As on the CPU, and what the GPU refuses.
pub(in crate::calibration) fn sweep(
    machine: &Machine,
    network: &Network,
    source: &ModelSource,
    dtype: DType,
    samples: Vec<Arrays>,
    see: &mut See<'_>,
) -> std::result::Result<Vec<Arrays>, InterpretError> {
    let axes = samples.iter().map(|inputs| sizes(network, inputs)).collect::<std::result::Result<Vec<_>, _>>()?;
    let (sender, weights) = sync_channel(AHEAD);
    std::thread::scope(|scope| {
        // Weights are read while the GPU computes; the channel closes when the sweep ends, however it does.
        scope.spawn(move || {
            for node in network.nodes.iter().filter(|node| is_uploaded(&node.op)) {
                let stored = node.op.weights().into_iter().map(|weight| quant::materialize(weight, source, dtype));
                let stored = stored.collect::<std::result::Result<Vec<_>, _>>();
                let stored =
                    stored.map_err(|error| InterpretError::Weight { path: node.path.clone(), source: error.into() });
                if sender.send(stored).is_err() {
                    break;
                }
            }
        });
        Sweep { machine, network, source, dtype, axes, weights }.run(samples, see)
    })
}

/// Ops whose weights the GPU needs.
fn is_uploaded(op: &Op) -> bool {
    matches!(op, Op::Linear { .. } | Op::BiasAdd { .. } | Op::Norm { .. } | Op::ScaleBy { .. } | Op::Embed { .. })
}

struct Sweep<'s> {
    machine: &'s Machine,
    network: &'s Network,
    source: &'s ModelSource,
    dtype: DType,
    axes: Vec<HashMap<Axis, usize>>,
    weights: Receiver<std::result::Result<Vec<Stored>, InterpretError>>,
}

impl Sweep<'_> {
    fn run(&self, mut samples: Vec<Arrays>, see: &mut See<'_>) -> std::result::Result<Vec<Arrays>, InterpretError> {
        let last_use = self.network.last_use();
        let mut values: Vec<Option<Value>> = Vec::with_capacity(self.network.nodes.len());
        for (position, node) in self.network.nodes.iter().enumerate() {
            let fail = |reason: String| InterpretError::Node { path: node.path.clone(), reason };
            let value = if node.op == Op::Input {
                let arrays = samples.iter_mut().map(|inputs| inputs.remove(&node.path)).collect::<Option<_>>();
                Value::of_host(arrays.ok_or_else(|| fail("an input is missing".into()))?)
            } else {
                let inputs = node.inputs.iter().map(|id| values[id.0].as_ref()).collect::<Option<Vec<_>>>();
                let inputs = inputs.ok_or_else(|| fail("an input was dropped too early".into()))?;
                see(position, node, inputs.first().copied()).map_err(fail)?;
                let stored = if is_uploaded(&node.op) {
                    self.weights.recv().map_err(|_| fail("its weights were not read".into()))??
                } else {
                    Vec::new()
                };
                match self.node(node, &inputs, stored).map_err(fail)? {
                    Some(value) => value,
                    None => self.on_host(node, &inputs)?,
                }
            };
            values.push(Some(value));
            for input in node.inputs.iter().filter(|input| last_use[input.0] == position) {
                values[input.0] = None;
            }
        }
        let mut outputs = vec![Arrays::new(); samples.len()];
        for (name, NodeId(place)) in &self.network.outputs {
            let Some(value) = &values[*place] else { continue };
            let fail = |reason: String| InterpretError::Node { path: name.clone(), reason };
            let arrays = value.on_host(self.machine).map_err(fail)?;
            for (outputs, array) in std::iter::zip(&mut outputs, &*arrays) {
                outputs.insert(name.clone(), array.clone());
            }
        }
        Ok(outputs)
    }

    /// Nothing where the GPU has no kernel for the node.
    fn node(&self, node: &Node, inputs: &[&Value], stored: Vec<Stored>) -> Result<Option<Value>> {
        let machine = self.machine;
        let x = inputs.first().ok_or("it has no input")?;
        let like = |floats: Floats| Some(Value::of_gpu(x.shapes.clone(), floats));
        let vector = |place: usize| stored.get(place).map(|stored| machine.upload(&stored.to_f32())).transpose();
        let along = |kind: i32| {
            let vector = vector(0)?.ok_or("its weight is not loaded")?;
            let width = vector.len();
            if x.shapes.iter().any(|shape| shape.iter().product::<usize>() % width.max(1) != 0) {
                return Err("its weight does not fit".to_owned());
            }
            machine.along(&*x.on_gpu(machine)?, &vector, width, x.count(), kind)
        };
        Ok(match &node.op {
            Op::Linear { weight, .. } => {
                let stored = stored.first().ok_or("its weight is not loaded")?;
                let matrix = self.matrix(weight, stored)?;
                if x.width() != matrix.inputs {
                    return Err("its weight does not fit".into());
                }
                let floats = machine.linear(&*x.on_gpu(machine)?, &matrix, x.rows().iter().sum())?;
                let wide = |shape: &Vec<usize>| [&shape[..shape.len() - 1], &[matrix.outputs]].concat();
                Some(Value::of_gpu(x.shapes.iter().map(wide).collect(), floats))
            }
            Op::BiasAdd { .. } => like(along(0)?),
            Op::ScaleBy { divide, .. } => like(along(if *divide { 2 } else { 1 })?),
            Op::Norm { kind, epsilon, .. } => {
                let (weight, bias) = (vector(0)?, vector(1)?);
                if weight.as_ref().is_none_or(|weight| weight.len() != x.width()) {
                    return Err("its weight does not fit".into());
                }
                let rows = x.rows().iter().sum();
                let vectors = [weight.as_ref(), bias.as_ref()];
                like(machine.norm(&*x.on_gpu(machine)?, rows, *kind, vectors, *epsilon)?)
            }
            Op::Activation { kind } => like(machine.activation(&*x.on_gpu(machine)?, x.count(), *kind)?),
            Op::Scale { factor } => like(machine.scale(&*x.on_gpu(machine)?, x.count(), *factor)?),
            Op::Binary { kind } => {
                let other = inputs.get(1).filter(|other| other.shapes == x.shapes).ok_or("its inputs do not fit")?;
                like(machine.pair(&*x.on_gpu(machine)?, &*other.on_gpu(machine)?, x.count(), *kind)?)
            }
            Op::Cast { .. } => Some((*x).clone()),
            Op::Reshape { shape } => {
                let size = |axes: &HashMap<Axis, usize>, dim: &Dim| match dim {
                    Dim::Fixed(size) => Some(*size),
                    Dim::Named(axis) => axes.get(axis).copied(),
                };
                let of = |axes: &HashMap<Axis, usize>| shape.iter().map(|dim| size(axes, dim)).collect::<Option<_>>();
                self.axes.iter().map(of).collect::<Option<Vec<_>>>().and_then(|shapes| x.reshaped(shapes))
            }
            Op::Embed { weight, .. } => {
                let (ids, stored) = (x.ints()?, stored.first().ok_or("its weight is not loaded")?);
                let table = self.matrix(weight, stored)?;
                let last = table.outputs.saturating_sub(1) as i32;
                if let Some(id) = ids.iter().find(|id| **id < 0) {
                    return Err(format!("token id {id} is negative"));
                }
                let ids: Vec<i32> = ids.into_iter().map(|id| id.min(last)).collect();
                let floats = machine.rows(&table.values, &ids, table.inputs)?;
                let wide = |shape: &Vec<usize>| [&shape[..], &[table.inputs]].concat();
                Some(Value::of_gpu(x.shapes.iter().map(wide).collect(), floats))
            }
            Op::Splice { vocab } => self.splice(inputs, *vocab)?,
            Op::LastToken => {
                let last = inputs.get(1).ok_or("its inputs do not fit")?.ints()?;
                let (mut index, mut first) = (Vec::new(), 0);
                let mut last = last.into_iter();
                for shape in &x.shapes {
                    let &[batch, tokens, _] = &shape[..] else { return Ok(None) };
                    for token in last.by_ref().take(batch) {
                        let inside = usize::try_from(token).ok().filter(|token| *token < tokens);
                        index.push((first + inside.ok_or("last token outside the tokens")?) as i32);
                        first += tokens;
                    }
                }
                let floats = machine.rows(&*x.on_gpu(machine)?, &index, x.width())?;
                Some(Value::of_gpu(x.shapes.iter().map(|shape| vec![shape[0], shape[2]]).collect(), floats))
            }
            Op::Attention(attention) => self.attention(attention, inputs)?,
            _ => None,
        })
    }

    fn matrix(&self, weight: &Weight, stored: &Stored) -> Result<Matrix> {
        let &[outputs, inputs] = &weight.shape()[..] else { return Err("its weight is no matrix".into()) };
        let exact = stored.scale.is_none() && matches!(stored.dtype, DType::Float16 | DType::Bfloat16);
        let values = match exact {
            true => self.machine.widen(&stored.bytes, stored.dtype)?,
            false => self.machine.upload(&stored.to_f32())?,
        };
        Ok(Matrix { values, outputs, inputs, exact })
    }

    /// Picture features in the place of ids beyond the words.
    fn splice(&self, inputs: &[&Value], vocab: usize) -> Result<Option<Value>> {
        let [x, ids, table] = inputs else { return Err("its inputs do not fit".into()) };
        let row = |id: &i32| usize::try_from(*id).ok().and_then(|id| id.checked_sub(vocab));
        if ids.ints()?.iter().all(|id| row(id).is_none()) {
            return Ok(Some((*x).clone()));
        }
        let (ids, table) = (ids.on_host(self.machine)?, table.on_host(self.machine)?);
        let mut floats = self.machine.copy(&*x.on_gpu(self.machine)?)?;
        let width = x.width();
        for ((ids, table), place) in std::iter::zip(&*ids, &*table).zip(x.places()) {
            let (ids, table) = (ids.ints()?, table.floats()?);
            let mut at = 0;
            while at < ids.len() {
                let Some(first) = row(&ids[at]) else {
                    at += 1;
                    continue;
                };
                // Rows that follow each other go up together.
                let count =
                    (1..ids.len() - at).take_while(|step| row(&ids[at + step]) == Some(first + step)).count() + 1;
                let rows = table.get(first * width..(first + count) * width).ok_or_else(|| {
                    format!("id {} is beyond a prompt table of {} rows", ids[at], table.len() / width.max(1))
                })?;
                self.machine.upload_at(rows, &mut floats, place + at * width)?;
                at += count;
            }
        }
        Ok(Some(Value::of_gpu(x.shapes.clone(), floats)))
    }

    /// Without a bias, and with a cache only an empty one.
    fn attention(&self, attention: &Attention, inputs: &[&Value]) -> Result<Option<Value>> {
        let Attention { heads, kv_heads, head_dim: dim, scale, mask, rope, .. } = attention;
        let (heads, kv_heads, dim) = (*heads, *kv_heads, *dim);
        if attention.relative_bias.is_some() || attention.window_bias.is_some() || attention.key_lengths {
            return Ok(None);
        }
        let [query, key, value, others @ ..] = inputs else { return Err("its inputs do not fit".into()) };
        let past = others.get(usize::from(rope.is_some())).filter(|_| attention.cache.is_some());
        if let Some(past) = past
            && past.ints()?.iter().any(|past| *past != 0)
        {
            return Ok(None);
        }
        let machine = self.machine;
        let (mut q, mut k, v) = (query.on_gpu(machine)?, key.on_gpu(machine)?, value.on_gpu(machine)?);
        if let (Some(rope), Some(positions)) = (rope, others.first()) {
            let frequencies = machine.upload(&rope.frequencies(dim))?;
            let positions = machine.upload(&positions.ints()?)?;
            let turned = |x: &Value, floats: &Floats, heads| {
                machine.rotate(floats, &positions, &frequencies, x.rows().iter().sum(), heads)
            };
            q = turned(query, &q, heads)?.into();
            k = turned(key, &k, kv_heads)?.into();
        }
        let sizes = Heads { heads, kv_heads, dim, scale: *scale, causal: *mask == Mask::Causal };
        let mut requests = Vec::new();
        let (mut first, mut first_key) = (0, 0);
        for shapes in std::iter::zip(&query.shapes, &key.shapes) {
            let (&[batch, tokens, _], &[_, keys, _]) = (&shapes.0[..], &shapes.1[..]) else { return Ok(None) };
            for _ in 0..batch {
                requests.push(Request { query: first, key: first_key, tokens, keys });
                (first, first_key) = (first + tokens, first_key + keys);
            }
        }
        let room = requests.iter().map(|request| heads * request.tokens * request.keys).max().unwrap_or(0);
        let (scores, result) = (machine.fresh(room)?, machine.fresh(query.count())?);
        for request in requests {
            machine.attend([&q, &k, &v, &scores, &result], sizes, request)?;
        }
        Ok(Some(Value::of_gpu(query.shapes.clone(), result)))
    }

    fn on_host(&self, node: &Node, inputs: &[&Value]) -> std::result::Result<Value, InterpretError> {
        let fail = |reason: String| InterpretError::Node { path: node.path.clone(), reason };
        let arrays =
            inputs.iter().map(|value| value.on_host(self.machine)).collect::<Result<Vec<_>>>().map_err(fail)?;
        let of = |(sample, axes)| {
            let read: Vec<&Array> = arrays.iter().map(|arrays| &arrays[sample]).collect();
            (axes, read)
        };
        let samples: Vec<_> = self.axes.iter().enumerate().map(of).collect();
        let values = CheckpointValues { source: self.source, compute: self.dtype };
        Ok(Value::of_host(compute(node, &values, &samples)?))
    }
}
