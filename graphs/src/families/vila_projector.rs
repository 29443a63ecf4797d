//! From vision features to the language model's embeddings in VILA (Lin et al. 2023, arXiv 2312.07533).
//! Names and semantics of `llava/model/multimodal_projector/base_projector.py` of the VILA sources, branch vila1.5.
use crate::config::Keys;
use crate::{ActivationKind, GraphError, Scope, Tensor};

/// That of PyTorch's `LayerNorm`, which the config cannot change.
const EPSILON: f32 = 1e-5;
/// More linear layers than any projector has; VILA's have two.
const DEEPEST: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VilaProjector {
    Linear,
    /// `mlpNx_gelu`: N linear layers with GELU between them.
    Mlp {
        depth: usize,
    },
    /// Neighbourhoods of 2 x 2 patches joined feature by feature, a norm, then two linear layers.
    Downsample,
}

impl VilaProjector {
    pub(crate) fn from_config(keys: &Keys) -> Result<VilaProjector, GraphError> {
        let key = "mm_projector_type";
        match keys.text(key, "linear")? {
            "linear" => Ok(VilaProjector::Linear),
            "mlp_downsample" => Ok(VilaProjector::Downsample),
            other => {
                let depth = other.strip_prefix("mlp").and_then(|rest| rest.strip_suffix("x_gelu")?.parse().ok());
                let depth = depth.filter(|depth| (1..=DEEPEST).contains(depth)).ok_or_else(|| {
                    keys.fault(key, format!("wanted `linear`, `mlpNx_gelu` or `mlp_downsample`, found `{other}`"))
                })?;
                Ok(VilaProjector::Mlp { depth })
            }
        }
    }

    /// Rows that a picture of `side` x `side` patches becomes.
    pub fn rows(self, side: usize) -> usize {
        let side = if self == VilaProjector::Downsample { side.div_ceil(2) } else { side };
        side * side
    }

    /// Features `[batch, side * side, width]` to `[batch, rows, out]`.
    pub(crate) fn write<'g>(self, s: &Scope<'g>, features: Tensor<'g>, side: usize, out: usize) -> Tensor<'g> {
        let linear = |place: usize, x| s.linear(&format!("layers.{place}"), out).bias().of(x);
        match self {
            VilaProjector::Linear => s.linear("layers", out).bias().of(features),
            // The places between hold the activations.
            VilaProjector::Mlp { depth } => {
                (1..depth).fold(linear(0, features), |x, number| linear(2 * number, x.activation(ActivationKind::Gelu)))
            }
            VilaProjector::Downsample => {
                let x = s.layer_norm("layers.1", EPSILON).of(neighbourhoods(features, side));
                linear(4, linear(2, x).activation(ActivationKind::Gelu))
            }
        }
    }
}

/// `[batch, side * side, width]` to `[batch, half * half, 4 * width]`, row by row within a neighbourhood; an odd side gets
/// a column and a row of zeros at its end.
fn neighbourhoods(x: Tensor<'_>, side: usize) -> Tensor<'_> {
    let (batch, width) = (x.ty().shape[0], x.ty().shape.last().and_then(|dim| dim.fixed()).unwrap_or(0));
    let mut grid = x.reshape([batch, side.into(), side.into(), width.into()]);
    if !side.is_multiple_of(2) {
        grid = grid.pad(1, 1).pad(2, 1);
    }
    let half = side.div_ceil(2);
    grid.reshape([batch, half.into(), 2.into(), half.into(), 2.into(), width.into()])
        .transpose(&[0, 1, 3, 2, 4, 5])
        .reshape([batch, (half * half).into(), (4 * width).into()])
}
