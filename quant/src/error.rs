//! What can go wrong between a checkpoint and stored weights, and in recipes.
use crate::SourceError;
use graphs::DType;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum QuantError {
    #[error("tensor `{tensor}` is missing")]
    Missing { tensor: String },
    #[error("tensor `{tensor}` has shape {found:?}, wanted {wanted:?}")]
    Shape { tensor: String, found: Vec<usize>, wanted: Vec<usize> },
    #[error("tensor `{tensor}` has dtype `{found}`, wanted {wanted}")]
    Type { tensor: String, found: DType, wanted: String },
    #[error("tensor `{tensor}` cannot be read: {source}")]
    Read { tensor: String, source: SourceError },
    #[error("tensor `{tensor}` holds `{value}` at {index:?}, wanted finite weights ({count} are not finite)")]
    NotFinite { tensor: String, index: Vec<usize>, value: f32, count: usize },
    #[error("tensor `{tensor}` holds `{value}` at {index:?}, beyond the largest `{dtype}`")]
    Overflow { tensor: String, index: Vec<usize>, value: f32, dtype: DType },
    #[error("tensor `{tensor}` needs a scale of `{value}` at {index:?}, beyond the largest `{dtype}`")]
    ScaleOverflow { tensor: String, index: Vec<usize>, value: f32, dtype: DType },
    #[error("weight `{weight}` has {found} inputs, wanted a multiple of the group `{group}`")]
    Group { weight: String, found: usize, group: usize },
    #[error("weight `{weight}` has {found} outputs, wanted an even number for int4")]
    OddOutputs { weight: String, found: usize },
    #[error("weight `{weight}` is sliced at {start}..{end} along axis {axis}, wanted multiples of `{step}`")]
    SliceStep { weight: String, axis: usize, start: usize, end: usize, step: usize },
    #[error("weight `{weight}` cannot be stored: {reason}")]
    Expression { weight: String, reason: String },
    #[error("weights cannot be written: {0}")]
    Write(#[from] std::io::Error),
    #[error("weight file `{}` is refused: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("recipe `{file}`: {message}")]
    Recipe { file: String, message: String },
    #[error("recipe `{recipe}`: rule {rule} (`{pattern}`) matches no linear layer")]
    RuleUnused { recipe: String, rule: usize, pattern: String, nearest: Option<String> },
    #[error("recipe `{recipe}` quantizes none of the {linears} linear layers")]
    NothingQuantized { recipe: String, linears: usize, nearest: Option<String> },
    #[error("recipe `{recipe}`: layer `{path}` has {found} inputs, wanted a multiple of {groups:?}")]
    NoGroup { recipe: String, path: String, found: usize, groups: Vec<usize> },
    #[error("layer `{path}` has {found} outputs, wanted an even number for int4")]
    OddLayer { path: String, found: usize },
    #[error("there is no quantization preset `{name}`")]
    UnknownPreset { name: String },
}

impl QuantError {
    /// What the user can do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Missing { .. } => "the checkpoint is incomplete, or of another model family".into(),
            Self::Shape { .. } => "the config and the weights do not belong together".into(),
            Self::NotFinite { .. } => {
                "the checkpoint is damaged: fetch it again, or leave this layer unquantized".into()
            }
            Self::Overflow { .. } | Self::ScaleOverflow { .. } => {
                "build with `--dtype bfloat16` or `--dtype float32`".into()
            }
            Self::Group { found, .. } | Self::NoGroup { found, .. } => {
                let groups: Vec<usize> =
                    [256, 128, 64, 32, 16].into_iter().filter(|group| found % group == 0).collect();
                match groups.as_slice() {
                    [] => "no group divides this width: use `int8` or `none` for this layer".into(),
                    _ => format!("groups that divide {found}: {groups:?}; or give the rule a `fallback`"),
                }
            }
            Self::OddOutputs { .. } | Self::OddLayer { .. } => "use `int8` or `none` for this layer".into(),
            Self::SliceStep { axis: 1, step, .. } => {
                format!("shard by a size that is a multiple of {step}, or take a smaller group")
            }
            Self::SliceStep { .. } => "two int4 weights share a byte: shard by an even size".into(),
            Self::RuleUnused { nearest: Some(path), .. } | Self::NothingQuantized { nearest: Some(path), .. } => {
                format!("the nearest layer is `{path}`")
            }
            Self::UnknownPreset { .. } => {
                format!("presets: {}; or the path of a .toml recipe", crate::recipe::preset_names())
            }
            _ => return None,
        })
    }
}
