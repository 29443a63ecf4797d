//! Quantization recipes, round to nearest, packing, and materializing weight expressions from a checkpoint.
pub mod awq;
mod balance;
mod budget;
mod check;
mod clip;
mod convert;
mod deviation;
mod error;
mod materialize;
mod matrix;
mod pack;
mod plain;
mod pool;
mod recipe;
mod round;
mod rounded;
mod smooth;
mod source;
mod statistics;
mod store;
mod strip;

pub use budget::{Price, allot};
pub use clip::clip;
pub use convert::{from_f32, to_f32};
pub use deviation::Deviation;
pub use error::QuantError;
pub use materialize::{Stored, materialize, materialize_f32, materialize_with};
pub use pack::{pack, unpack};
pub use plain::{plain_entry, read_plain};
pub use pool::Pool;
pub use recipe::{Assignment, Method, Recipe, assign, assign_part, check_used, path_glob};
pub use rounded::{round_to_nearest, scale_columns};
pub use smooth::{ALPHAS, Smoothed, activation_scale, join_column_absmax, smooth};
pub use source::{Entry, MemorySource, Source, SourceError};
pub use statistics::{Gathered, InputStatistics, Kept, Share};
pub use store::{
    Layout, Named, Place, RawHeader, StoreSummary, StoredWeights, layout, scale_key, store_named, store_weights,
};
/// Names of the built-in recipes; besides them `int4-gN`, `int4-mse-gN` and `int4-awq-gN` take groups of N, and
/// `int4-channel` none.
pub const PRESETS: [&str; 11] = [
    "none",
    "int8",
    "int4",
    "int8-mse",
    "int4-mse",
    "int8-awq",
    "int4-awq",
    "int8-sq",
    "int8-sq-token",
    "int8-absmax",
    "int8-absmax-token",
];
