//! Calibration: what the networks' layers read is gathered from the user's samples into a file of statistics, and what
//! smoothing and clipping need is found from it.
mod channels;
mod file;
mod fingerprint;
mod gather;
mod gpu;
mod search;

pub use channels::Channels;
pub use file::{Header, Statistics, StatisticsError};
pub use fingerprint::fingerprint;
pub use gather::{GatherError, GatherOptions, gather};
pub use gpu::{GpuError, KERNELS, Machine};
pub use search::{SearchError, Searched, Vectors, Wanted};
