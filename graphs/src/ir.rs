//! The network IR: nodes in order, each with a path, an op, inputs and a type.
use crate::{DType, RelativeBias, Rope, Weight, WindowBias, int8_row};
use serde::{Deserialize, Serialize};

/// A dimension whose size is known only when the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Requests (or pictures) in one call.
    Batch,
    /// New tokens of each request in one call: the prompt's in prefill, 1 in decode.
    Tokens,
    /// Rows of the prompt table: picture features of all requests, one after the other.
    Features,
    /// Tokens of each request that an encoder reads.
    Source,
}

impl Axis {
    pub fn name(self) -> &'static str {
        match self {
            Axis::Batch => "batch",
            Axis::Tokens => "tokens",
            Axis::Features => "features",
            Axis::Source => "source",
        }
    }

    pub fn parse(text: &str) -> Option<Axis> {
        [Axis::Batch, Axis::Tokens, Axis::Features, Axis::Source].into_iter().find(|axis| axis.name() == text)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    Fixed(usize),
    Named(Axis),
}

impl Dim {
    pub fn fixed(self) -> Option<usize> {
        match self {
            Dim::Fixed(size) => Some(size),
            Dim::Named(_) => None,
        }
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Dim {
        Dim::Fixed(size)
    }
}

impl From<Axis> for Dim {
    fn from(axis: Axis) -> Dim {
        Dim::Named(axis)
    }
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Dim::Fixed(size) => write!(f, "{size}"),
            Dim::Named(axis) => f.write_str(axis.name()),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Type {
    pub dtype: DType,
    pub shape: Vec<Dim>,
}

impl Type {
    pub fn new(dtype: DType, shape: impl Into<Vec<Dim>>) -> Type {
        Type { dtype, shape: shape.into() }
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, shape.join(","))
    }
}

/// Position of a node in [`Network::nodes`]; inputs always come before their users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub usize);

#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Unique; the checkpoint's name for layers with weights. Also the recipe's glob target, the key of statistics,
    /// the TensorRT layer name and the name in every error.
    pub path: String,
    pub op: Op,
    pub inputs: Vec<NodeId>,
    pub ty: Type,
}

/// How a layer is divided over the ranks of tensor parallelism; sizes in the network are always those of the whole model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    #[default]
    None,
    /// By outputs; what follows works on a part of the features.
    Column,
    /// By inputs; partial sums are all-reduced.
    Row,
    /// By vocabulary entries.
    Vocab,
    /// Sums of the inputs by groups of consecutive ones: divided where its input is, as that is.
    Groups,
}

impl Split {
    pub fn is_none(&self) -> bool {
        *self == Split::None
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// (x - mean) / sqrt(var + epsilon) * weight + bias.
    Layer,
    /// x / sqrt(mean(x^2) + epsilon) * weight.
    Rms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationKind {
    Relu,
    Silu,
    /// x * Phi(x), by the error function.
    Gelu,
    /// The tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// x * sigmoid(1.702 x).
    QuickGelu,
}

impl ActivationKind {
    /// From the name in a Hugging Face config (`hidden_act`).
    pub fn from_config(name: &str) -> Option<ActivationKind> {
        Some(match name {
            "relu" => ActivationKind::Relu,
            "silu" | "swish" => ActivationKind::Silu,
            "gelu" => ActivationKind::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => ActivationKind::GeluTanh,
            "quick_gelu" => ActivationKind::QuickGelu,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BinaryKind {
    Add,
    Multiply,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// Every query sees every key.
    None,
    /// Query i of a request sees its cached keys and the new keys 0..=i.
    Causal,
}

/// Attention with everything in it.
///
/// Inputs: query `[batch, tokens, heads * head_dim]`, key and value `[batch, tokens, kv_heads * head_dim]`; with a rope
/// then `position_ids` int32 `[batch, tokens]`; with a cache then `past_lengths` int32 `[batch]` (rows of the cache that
/// are filled before this call: new keys are written there) and `sequence_lengths` int32 `[batch]` (rows filled after it);
/// without a cache and with `key_lengths` then those, int32 `[batch]` (keys that count, from the first on).
/// Query head h uses key/value head h / (heads / kv_heads).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Factor of the scores; head_dim^-0.5 except in T5.
    pub scale: f32,
    pub mask: Mask,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<Rope>,
    /// Added to the scores by how far key and query are apart (T5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_bias: Option<RelativeBias>,
    /// Added to the scores by where key and query are in their window (Swin); without a cache, a mask and positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bias: Option<WindowBias>,
    /// Slot of the key/value cache (the decoder layer's number).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<usize>,
    /// The cache holds INT8 rows (`int8_row`), and new keys and values too are read back from it; only with a cache.
    #[serde(default, skip_serializing_if = "is_false")]
    pub int8_cache: bool,
    /// Keys beyond each request's number do not count; only without a cache.
    #[serde(default, skip_serializing_if = "is_false")]
    pub key_lengths: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Attention {
    /// Inputs besides query, key and value.
    pub fn extra_inputs(&self) -> usize {
        usize::from(self.rope.is_some()) + 2 * usize::from(self.cache.is_some()) + usize::from(self.key_lengths)
    }

    /// The cache that it reads and writes.
    pub fn kept(&self) -> Option<Cache> {
        let Attention { kv_heads, head_dim, int8_cache: int8, .. } = *self;
        self.cache.map(|slot| Cache { slot, kv_heads, head_dim, int8 })
    }
}

/// Ids `first..end`, the first of which is row `row` of a rank's part of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnIds {
    pub first: usize,
    pub end: usize,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub row: usize,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl OwnIds {
    /// The row of an id of this rank, else `None`.
    pub fn row_of(&self, id: usize) -> Option<usize> {
        (self.first..self.end).contains(&id).then(|| id - self.first + self.row)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A network input of the node's name and type.
    Input,
    /// x W^T; weight `[out, in]`.
    Linear {
        weight: Weight,
        #[serde(default, skip_serializing_if = "Split::is_none")]
        split: Split,
    },
    /// x plus a weight whose shape, but for ones at its start, is the end of x's (a bias `[features]`, position
    /// embeddings `[rows, features]` or `[1, rows, features]`).
    BiasAdd {
        weight: Weight,
    },
    /// Over the last dimension.
    Norm {
        kind: NormKind,
        weight: Weight,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bias: Option<Weight>,
        epsilon: f32,
    },
    Activation {
        kind: ActivationKind,
    },
    /// Times a number.
    Scale {
        factor: f32,
    },
    /// Times a weight whose length is x's last size, or divided by it (smoothing).
    ScaleBy {
        weight: Weight,
        #[serde(default, skip_serializing_if = "is_false")]
        divide: bool,
    },
    /// Rounded to INT8 steps, for INT8 arithmetic in the linear layers that read it, and only they: a multiple of the
    /// scale, from -128 to 127 times it. Without a `scale` (one float) each token has its own, its largest magnitude / 127,
    /// or where `wide` / 127.5, which clips that magnitude itself (compressed-tensors). Of a divided token that magnitude
    /// is the largest along the last axis of a second input, what the ranks' `Largest` add up to.
    QuantizeInput {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scale: Option<Weight>,
        #[serde(default, skip_serializing_if = "is_false")]
        wide: bool,
    },
    /// Of two tensors of one shape.
    Binary {
        kind: BinaryKind,
    },
    Attention(Attention),
    /// Convolution without padding: x `[batch, in, height, width]`, weight `[out, in, k, k]`.
    Conv {
        weight: Weight,
        stride: usize,
    },
    /// The largest magnitude of each token, at place `rank` of `ranks` along the last axis, and zeros at the others.
    Largest {
        rank: usize,
        ranks: usize,
    },
    /// Rows of a table `[vocab, hidden]`; ids past the table's end take its last row (see `Splice`). One rank's part gives
    /// the rows of its `own` ids and zeros for others.
    Embed {
        weight: Weight,
        #[serde(default, skip_serializing_if = "Split::is_none")]
        split: Split,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        own: Option<OwnIds>,
    },
    /// Inputs: embedded ids, the ids, the prompt table `[features, hidden]`. Where id >= vocab: table row id - vocab.
    Splice {
        vocab: usize,
    },
    /// A weight repeated for each element of x's first dimension: `[batch, ...weight]`.
    Broadcast {
        weight: Weight,
    },
    Concat {
        axis: usize,
    },
    Slice {
        axis: usize,
        start: usize,
        end: usize,
    },
    /// `after` zeros behind the end of one axis.
    Pad {
        axis: usize,
        after: usize,
    },
    /// The first `by` places of an axis go behind its end.
    Roll {
        axis: usize,
        by: usize,
    },
    Reshape {
        shape: Vec<Dim>,
    },
    Transpose {
        permutation: Vec<usize>,
    },
    /// Inputs: x `[batch, tokens, hidden]`, last token's index int32 `[batch]`. Result `[batch, hidden]`.
    LastToken,
    Cast {
        dtype: DType,
    },
    /// The sum over all ranks, on each of them.
    AllReduce {
        ranks: usize,
    },
    /// What all ranks have, one after the other along the last axis.
    AllGather {
        ranks: usize,
    },
}

impl Op {
    /// Name of the op in text.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input => "input",
            Op::Linear { .. } => "linear",
            Op::BiasAdd { .. } => "bias_add",
            Op::Norm { .. } => "norm",
            Op::Activation { .. } => "activation",
            Op::Scale { .. } => "scale",
            Op::ScaleBy { .. } => "scale_by",
            Op::QuantizeInput { .. } => "quantize_input",
            Op::Largest { .. } => "largest",
            Op::Binary { .. } => "binary",
            Op::Attention(_) => "attention",
            Op::Conv { .. } => "conv",
            Op::Embed { .. } => "embed",
            Op::Splice { .. } => "splice",
            Op::Broadcast { .. } => "broadcast",
            Op::Concat { .. } => "concat",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Roll { .. } => "roll",
            Op::Reshape { .. } => "reshape",
            Op::Transpose { .. } => "transpose",
            Op::LastToken => "last_token",
            Op::Cast { .. } => "cast",
            Op::AllReduce { .. } => "all_reduce",
            Op::AllGather { .. } => "all_gather",
        }
    }

    /// Whether it waits for other ranks.
    pub fn is_collective(&self) -> bool {
        matches!(self, Op::AllReduce { .. } | Op::AllGather { .. })
    }

    pub fn weights(&self) -> Vec<&Weight> {
        match self {
            Op::Linear { weight, .. }
            | Op::BiasAdd { weight }
            | Op::Conv { weight, .. }
            | Op::Embed { weight, .. }
            | Op::ScaleBy { weight, .. }
            | Op::Broadcast { weight } => vec![weight],
            Op::QuantizeInput { scale, .. } => scale.iter().collect(),
            Op::Norm { weight, bias, .. } => std::iter::once(weight).chain(bias).collect(),
            Op::Attention(Attention { relative_bias, window_bias, .. }) => {
                let relative = relative_bias.iter().map(|bias| &bias.weight);
                relative.chain(window_bias.iter().map(|bias| &bias.weight)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// One key/value cache that a network reads and writes: keys and values `[batch, kv_heads, rows, row_elements]` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    pub slot: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Rows are INT8 with their scale behind them.
    pub int8: bool,
}

impl Cache {
    /// The type that it is stored in, where the network computes in `compute`.
    pub fn dtype(&self, compute: DType) -> DType {
        if self.int8 { DType::Int8 } else { compute }
    }

    /// Elements of one head's row as they are stored.
    pub fn row_elements(&self) -> usize {
        if self.int8 { int8_row::stored_bytes(self.head_dim) } else { self.head_dim }
    }

    /// Bytes of one token's keys and values of all heads.
    pub fn token_bytes(&self, compute: DType) -> usize {
        2 * self.kv_heads * self.dtype(compute).bytes(self.row_elements())
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// `vision`, `language` ...
    pub name: String,
    /// The type that weights and activations are computed in.
    pub dtype: DType,
    pub nodes: Vec<Node>,
    pub outputs: Vec<(String, NodeId)>,
}

impl Network {
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.0)
    }

    pub fn inputs(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.op == Op::Input)
    }

    /// Caches in slot order.
    pub fn caches(&self) -> Vec<Cache> {
        let mut caches: Vec<Cache> = self
            .nodes
            .iter()
            .filter_map(|node| match &node.op {
                Op::Attention(attention) => attention.kept(),
                _ => None,
            })
            .collect();
        caches.sort_by_key(|cache| cache.slot);
        caches
    }

    /// Every weight of the network with its node, in node order.
    pub fn weights(&self) -> impl Iterator<Item = (&Node, &Weight)> {
        self.nodes.iter().flat_map(|node| node.op.weights().into_iter().map(move |weight| (node, weight)))
    }

    /// For each node the position of its last reader, after which its value is not needed; beyond all nodes for outputs.
    pub fn last_use(&self) -> Vec<usize> {
        let mut last_use: Vec<usize> = (0..self.nodes.len()).collect();
        for (position, node) in self.nodes.iter().enumerate() {
            for input in &node.inputs {
                last_use[input.0] = position;
            }
        }
        for (_, id) in &self.outputs {
            last_use[id.0] = usize::MAX;
        }
        last_use
    }
}
