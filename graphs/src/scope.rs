//! The DSL: a layer is written once, by a function that names and emits it.
//!
//! ```
//! use graphs::{ActivationKind, Axis, DType, Graph, Type};
//! let graph = Graph::new("language", DType::Float16);
//! let mlp = graph.scope("model.layers.0.mlp");
//! let x = graph.input("x", Type::new(DType::Float16, [Axis::Batch.into(), Axis::Tokens.into(), 64.into()]));
//! let wide = mlp.linear("fc1", 256).bias().column().of(x).activation(ActivationKind::Gelu);
//! let y = x + mlp.linear("fc2", 64).bias().row().of(wide);
//! graph.output("y", y);
//! assert_eq!(graph.finish().unwrap().nodes[1].path, "model.layers.0.mlp.fc1");
//! ```
//! The first error is kept and comes out of [`Graph::finish`] with the path of its node.
use crate::infer::infer;
use crate::{
    ActivationKind, Attention, BinaryKind, DType, Dim, GraphError, Mask, Network, Node, NodeId, NormKind, Op,
    RelativeBias, Rope, Split, Type, Weight, WindowBias,
};
use std::cell::RefCell;
use std::collections::HashSet;

/// A network being written.
pub struct Graph {
    dtype: DType,
    state: RefCell<State>,
}

struct State {
    network: Network,
    paths: HashSet<String>,
    error: Option<GraphError>,
}

/// A value in a [`Graph`].
#[derive(Clone, Copy)]
pub struct Tensor<'g> {
    graph: &'g Graph,
    id: NodeId,
}

/// A path prefix under which layers are emitted.
#[derive(Clone)]
pub struct Scope<'g> {
    graph: &'g Graph,
    path: String,
}

impl Graph {
    pub fn new(name: &str, dtype: DType) -> Graph {
        let network = Network { name: name.into(), dtype, nodes: Vec::new(), outputs: Vec::new() };
        Graph { dtype, state: RefCell::new(State { network, paths: HashSet::new(), error: None }) }
    }

    /// The type that weights and activations are computed in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn scope(&self, path: &str) -> Scope<'_> {
        Scope { graph: self, path: path.into() }
    }

    pub fn input(&self, name: &str, ty: Type) -> Tensor<'_> {
        self.push(name.into(), Op::Input, &[], Some(ty))
    }

    pub fn output(&self, name: &str, tensor: Tensor<'_>) {
        self.state.borrow_mut().network.outputs.push((name.into(), tensor.id));
    }

    /// The finished network, or the first error met while writing it.
    pub fn finish(self) -> Result<Network, GraphError> {
        let state = self.state.into_inner();
        match state.error {
            Some(error) => Err(error),
            None => Ok(state.network),
        }
    }

    fn push(&self, path: String, op: Op, inputs: &[Tensor<'_>], declared: Option<Type>) -> Tensor<'_> {
        let mut state = self.state.borrow_mut();
        let inferred = {
            let types: Vec<&Type> = inputs.iter().map(|x| &state.network.nodes[x.id.0].ty).collect();
            infer(&op, &types, declared.as_ref(), self.dtype)
        };
        let ty = inferred.unwrap_or_else(|reason| {
            state.error.get_or_insert(GraphError::Node { path: path.clone(), op: op.name(), reason });
            // Whatever follows sees the first input's type; only the first error is reported.
            inputs.first().map_or(Type::new(self.dtype, []), |x| state.network.nodes[x.id.0].ty.clone())
        });
        let path = state.unique(path);
        state.network.nodes.push(Node { path, op, inputs: inputs.iter().map(|x| x.id).collect(), ty });
        Tensor { graph: self, id: NodeId(state.network.nodes.len() - 1) }
    }
}

impl State {
    /// Layers without weights take their input's path and the op's name; a number tells repeated ones apart.
    fn unique(&mut self, path: String) -> String {
        let mut candidate = path.clone();
        let mut number = 1;
        while !self.paths.insert(candidate.clone()) {
            number += 1;
            candidate = format!("{path}.{number}");
        }
        candidate
    }
}

impl<'g> Scope<'g> {
    pub(crate) fn graph(&self) -> &'g Graph {
        self.graph
    }

    /// The type that the network is computed in.
    pub fn dtype(&self) -> DType {
        self.graph.dtype
    }

    pub fn sub(&self, name: &str) -> Scope<'g> {
        Scope { graph: self.graph, path: self.name(name) }
    }

    /// Layer `number` of a list: `layers.3`.
    pub fn layer(&self, name: &str, number: usize) -> Scope<'g> {
        self.sub(&format!("{name}.{number}"))
    }

    /// The whole name of something in this scope.
    pub fn name(&self, name: &str) -> String {
        if self.path.is_empty() { name.into() } else { format!("{}.{name}", self.path) }
    }

    /// A matrix product with `NAME.weight` `[out, in]`; `in` is the width of its input.
    pub fn linear(&self, name: &str, out: usize) -> Linear<'g> {
        let path = self.name(name);
        Linear { graph: self.graph, weight: format!("{path}.weight"), path, out, bias: false, split: Split::None }
    }

    pub fn layer_norm(&self, name: &str, epsilon: f32) -> Norm<'g> {
        Norm { graph: self.graph, path: self.name(name), kind: NormKind::Layer, epsilon }
    }

    pub fn rms_norm(&self, name: &str, epsilon: f32) -> Norm<'g> {
        Norm { graph: self.graph, path: self.name(name), kind: NormKind::Rms, epsilon }
    }

    /// Rows of `NAME.weight` `[vocab, hidden]` by id.
    pub fn embed(&self, name: &str, vocab: usize, hidden: usize, ids: Tensor<'g>) -> Tensor<'g> {
        let path = self.name(name);
        let weight = Weight::tensor(format!("{path}.weight"), &[vocab, hidden]);
        self.graph.push(path, Op::Embed { weight, split: Split::Vocab, own: None }, &[ids], None)
    }

    /// Rows of `NAME.weight` `[offset + count, hidden]` by position: the first `offset` rows are no position's.
    pub fn positions(
        &self,
        name: &str,
        offset: usize,
        count: usize,
        hidden: usize,
        position_ids: Tensor<'g>,
    ) -> Tensor<'g> {
        let path = self.name(name);
        let table = Weight::tensor(format!("{path}.weight"), &[offset + count, hidden]);
        let weight = Weight::Slice { axis: 0, start: offset, end: offset + count, of: Box::new(table) };
        self.graph.push(path, Op::Embed { weight, split: Split::None, own: None }, &[position_ids], None)
    }

    /// A convolution over patches: `NAME.weight` `[out, in, patch, patch]`, stride `patch`, no padding, no bias.
    pub fn patches(&self, name: &str, out: usize, patch: usize, x: Tensor<'g>) -> Tensor<'g> {
        let path = self.name(name);
        let channels = x.ty().shape.get(1).and_then(|dim| dim.fixed()).unwrap_or(0);
        let weight = Weight::tensor(format!("{path}.weight"), &[out, channels, patch, patch]);
        self.graph.push(path, Op::Conv { weight, stride: patch }, &[x], None)
    }

    /// The parameter `name` (its whole name, no `.weight` is added) repeated over the batch of `like`.
    pub fn broadcast(&self, name: &str, shape: &[usize], like: Tensor<'g>) -> Tensor<'g> {
        let path = self.name(name);
        let weight = Weight::tensor(path.clone(), shape);
        self.graph.push(path, Op::Broadcast { weight }, &[like], None)
    }

    /// x plus the parameter `name` (its whole name), whose shape is the end of x's; ones before it do not matter.
    pub fn add_parameter(&self, name: &str, shape: &[usize], x: Tensor<'g>) -> Tensor<'g> {
        let path = self.name(name);
        let weight = Weight::tensor(path.clone(), shape);
        self.graph.push(path, Op::BiasAdd { weight }, &[x], None)
    }

    pub fn attention(&self, heads: Heads) -> AttentionLayer<'g> {
        let attention = Attention {
            heads: heads.query,
            kv_heads: heads.key_value,
            head_dim: heads.dim,
            scale: (heads.dim as f32).powf(-0.5),
            mask: Mask::None,
            rope: None,
            relative_bias: None,
            window_bias: None,
            cache: None,
            int8_cache: false,
            key_lengths: false,
        };
        AttentionLayer { graph: self.graph, path: self.name("attention"), attention, extra: Vec::new() }
    }
}

pub struct Linear<'g> {
    graph: &'g Graph,
    path: String,
    weight: String,
    out: usize,
    bias: bool,
    split: Split,
}

impl<'g> Linear<'g> {
    /// Adds `NAME.bias`, as a node of its own: a row-split layer's bias is added once, after the all-reduce.
    pub fn bias(self) -> Self {
        self.bias_if(true)
    }

    pub fn bias_if(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    pub fn column(mut self) -> Self {
        self.split = Split::Column;
        self
    }

    pub fn row(mut self) -> Self {
        self.split = Split::Row;
        self
    }

    pub fn vocab(mut self) -> Self {
        self.split = Split::Vocab;
        self
    }

    /// Takes the weight from another layer's tensor (a head tied to the embedding).
    pub fn tied_to(mut self, tensor: String) -> Self {
        self.weight = tensor;
        self
    }

    pub fn of(self, x: Tensor<'g>) -> Tensor<'g> {
        let width = x.ty().shape.last().and_then(|dim| dim.fixed()).unwrap_or(0);
        let weight = Weight::tensor(self.weight, &[self.out, width]);
        let y = self.graph.push(self.path.clone(), Op::Linear { weight, split: self.split }, &[x], None);
        if !self.bias {
            return y;
        }
        let path = format!("{}.bias", self.path);
        let weight = Weight::tensor(path.clone(), &[self.out]);
        self.graph.push(path, Op::BiasAdd { weight }, &[y], None)
    }
}

pub struct Norm<'g> {
    graph: &'g Graph,
    path: String,
    kind: NormKind,
    epsilon: f32,
}

impl<'g> Norm<'g> {
    pub fn of(self, x: Tensor<'g>) -> Tensor<'g> {
        let width = x.ty().shape.last().and_then(|dim| dim.fixed()).unwrap_or(0);
        let weight = Weight::tensor(format!("{}.weight", self.path), &[width]);
        let bias = (self.kind == NormKind::Layer).then(|| Weight::tensor(format!("{}.bias", self.path), &[width]));
        let op = Op::Norm { kind: self.kind, weight, bias, epsilon: self.epsilon };
        self.graph.push(self.path, op, &[x], None)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub query: usize,
    pub key_value: usize,
    pub dim: usize,
}

pub struct AttentionLayer<'g> {
    graph: &'g Graph,
    path: String,
    attention: Attention,
    extra: Vec<Tensor<'g>>,
}

/// What a decoder's attention layers all read besides their own query, key and value.
#[derive(Clone, Copy)]
pub struct CacheInputs<'g> {
    pub past_lengths: Tensor<'g>,
    pub sequence_lengths: Tensor<'g>,
}

impl<'g> AttentionLayer<'g> {
    pub fn causal(mut self) -> Self {
        self.attention.mask = Mask::Causal;
        self
    }

    /// Comes before [`Self::cached`]: the inputs' order is positions, then lengths.
    pub fn rope(mut self, rope: &Rope, position_ids: Tensor<'g>) -> Self {
        self.attention.rope = Some(rope.clone());
        self.extra.push(position_ids);
        self
    }

    pub fn cached(mut self, slot: usize, inputs: CacheInputs<'g>) -> Self {
        self.attention.cache = Some(slot);
        self.extra.extend([inputs.past_lengths, inputs.sequence_lengths]);
        self
    }

    pub fn scale(mut self, scale: f32) -> Self {
        self.attention.scale = scale;
        self
    }

    pub fn relative_bias(mut self, bias: RelativeBias) -> Self {
        self.attention.relative_bias = Some(bias);
        self
    }

    pub fn window_bias(mut self, bias: WindowBias) -> Self {
        self.attention.window_bias = Some(bias);
        self
    }

    /// Only the first so many keys of each request count; the last input, and not together with a cache.
    pub fn key_lengths(mut self, lengths: Tensor<'g>) -> Self {
        self.attention.key_lengths = true;
        self.extra.push(lengths);
        self
    }

    pub fn of(self, query: Tensor<'g>, key: Tensor<'g>, value: Tensor<'g>) -> Tensor<'g> {
        let inputs: Vec<Tensor> = [query, key, value].into_iter().chain(self.extra).collect();
        self.graph.push(self.path, Op::Attention(self.attention), &inputs, None)
    }
}

impl<'g> Tensor<'g> {
    pub fn ty(self) -> Type {
        self.graph.state.borrow().network.nodes[self.id.0].ty.clone()
    }

    fn derived(self, op: Op, others: &[Tensor<'g>]) -> Tensor<'g> {
        let inputs: Vec<Tensor> = std::iter::once(self).chain(others.iter().copied()).collect();
        let newest = inputs.iter().map(|x| x.id).max().unwrap_or(self.id);
        let path = format!("{}/{}", self.graph.state.borrow().network.nodes[newest.0].path, op.name());
        self.graph.push(path, op, &inputs, None)
    }

    pub fn activation(self, kind: ActivationKind) -> Tensor<'g> {
        self.derived(Op::Activation { kind }, &[])
    }

    pub fn scaled(self, factor: f32) -> Tensor<'g> {
        self.derived(Op::Scale { factor }, &[])
    }

    pub fn reshape(self, shape: impl Into<Vec<Dim>>) -> Tensor<'g> {
        self.derived(Op::Reshape { shape: shape.into() }, &[])
    }

    pub fn transpose(self, permutation: &[usize]) -> Tensor<'g> {
        self.derived(Op::Transpose { permutation: permutation.to_vec() }, &[])
    }

    pub fn slice(self, axis: usize, start: usize, end: usize) -> Tensor<'g> {
        self.derived(Op::Slice { axis, start, end }, &[])
    }

    /// The first `by` places of an axis of fixed size moved behind its end.
    pub fn roll(self, axis: usize, by: usize) -> Tensor<'g> {
        self.derived(Op::Roll { axis, by }, &[])
    }

    /// `after` zeros behind the end of an axis of fixed size.
    pub fn pad(self, axis: usize, after: usize) -> Tensor<'g> {
        self.derived(Op::Pad { axis, after }, &[])
    }

    pub fn concat(self, axis: usize, others: &[Tensor<'g>]) -> Tensor<'g> {
        self.derived(Op::Concat { axis }, others)
    }

    /// Rows of the prompt table in place of the embeddings of ids from `vocab` on.
    pub fn splice(self, ids: Tensor<'g>, table: Tensor<'g>, vocab: usize) -> Tensor<'g> {
        self.derived(Op::Splice { vocab }, &[ids, table])
    }

    pub fn last_token(self, last_token_ids: Tensor<'g>) -> Tensor<'g> {
        self.derived(Op::LastToken, &[last_token_ids])
    }

    pub fn cast(self, dtype: DType) -> Tensor<'g> {
        if self.ty().dtype == dtype { self } else { self.derived(Op::Cast { dtype }, &[]) }
    }
}

impl<'g> std::ops::Add for Tensor<'g> {
    type Output = Tensor<'g>;
    fn add(self, other: Tensor<'g>) -> Tensor<'g> {
        self.derived(Op::Binary { kind: BinaryKind::Add }, &[other])
    }
}

impl<'g> std::ops::Mul for Tensor<'g> {
    type Output = Tensor<'g>;
    fn mul(self, other: Tensor<'g>) -> Tensor<'g> {
        self.derived(Op::Binary { kind: BinaryKind::Multiply }, &[other])
    }
}
