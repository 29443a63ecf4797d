//! Quantization recipes, round to nearest, packing, and materializing weight expressions from a checkpoint.
mod check;
mod convert;
mod error;
mod materialize;
mod matrix;
mod pack;
mod plain;
mod pool;
mod recipe;
mod round;
mod source;
mod store;
mod strip;

pub use convert::{from_f32, to_f32};
pub use error::QuantError;
pub use materialize::{Stored, materialize, materialize_f32, materialize_with};
pub use pack::{pack, unpack};
pub use pool::Pool;
pub use recipe::{Assignment, Recipe, assign, path_glob};
pub use source::{Entry, MemorySource, Source, SourceError};
pub use store::{Layout, Place, StoreSummary, StoredWeights, layout, scale_key, store_weights};
/// Names of the built-in recipes; besides them `int4-gN` takes groups of N and `int4-channel` none.
pub const PRESETS: [&str; 3] = ["none", "int8", "int4"];
