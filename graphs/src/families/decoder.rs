//! What networks that read tokens have in common: the inputs that the runtime feeds, and the embedded prompt.
use crate::{Axis, CacheInputs, DType, Graph, Logits, Scope, Tensor, Type};

/// Rows of OPT's and mBART's position table before that of position 0.
pub(super) const OFFSET: usize = 2;
/// Of their norms, PyTorch's default: no config names another.
pub(super) const EPSILON: f32 = 1e-5;

/// Inputs of every decoder-only language network and of mBART's decoder, int32: `input_ids`, `position_ids` `[batch, tokens]`; `past_lengths`,
/// `sequence_lengths` `[batch]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'g> {
    ids: Tensor<'g>,
    pub(crate) position_ids: Tensor<'g>,
    pub(crate) cache: CacheInputs<'g>,
}

impl<'g> Inputs<'g> {
    pub(crate) fn new(graph: &'g Graph) -> Inputs<'g> {
        let [ids, position_ids] = ["input_ids", "position_ids"].map(|name| tokens(graph, name, Axis::Tokens));
        Inputs { ids, position_ids, cache: cache(graph) }
    }

    /// As [`embed`] of the input ids.
    pub(crate) fn embed(&self, s: &Scope<'g>, name: &str, vocab: usize, hidden: usize, pictures: bool) -> Tensor<'g> {
        embed(s, name, [vocab, hidden], self.ids, pictures)
    }
}

/// An input int32 `[batch, AXIS]`: a number for each token.
pub(super) fn tokens<'g>(graph: &'g Graph, name: &str, axis: Axis) -> Tensor<'g> {
    graph.input(name, Type::new(DType::Int32, [Axis::Batch.into(), axis.into()]))
}

/// An input int32 `[batch]`.
pub(super) fn lengths<'g>(graph: &'g Graph, name: &str) -> Tensor<'g> {
    graph.input(name, Type::new(DType::Int32, [Axis::Batch.into()]))
}

/// The inputs `past_lengths` and `sequence_lengths` int32 `[batch]`.
pub(super) fn cache(graph: &Graph) -> CacheInputs<'_> {
    let [past_lengths, sequence_lengths] = ["past_lengths", "sequence_lengths"].map(|name| lengths(graph, name));
    CacheInputs { past_lengths, sequence_lengths }
}

/// Rows of `NAME.weight` `[vocab, hidden]`; where `pictures`, ids from `vocab` on are rows of the input
/// `prompt_embedding_table` `[features, hidden]`.
pub(super) fn embed<'g>(
    s: &Scope<'g>,
    name: &str,
    [vocab, hidden]: [usize; 2],
    ids: Tensor<'g>,
    pictures: bool,
) -> Tensor<'g> {
    let x = s.embed(name, vocab, hidden, ids);
    if !pictures {
        return x;
    }
    let table = Type::new(s.dtype(), [Axis::Features.into(), hidden.into()]);
    x.splice(ids, s.graph().input("prompt_embedding_table", table), vocab)
}

/// The tokens whose logits are wanted: with [`Logits::Last`] by the input `last_token_ids` int32 `[batch]`.
pub(super) fn wanted<'g>(graph: &'g Graph, x: Tensor<'g>, logits: Logits) -> Tensor<'g> {
    match logits {
        Logits::Last => x.last_token(lengths(graph, "last_token_ids")),
        Logits::All => x,
    }
}
