//! Engines are built in child processes: a crash inside TensorRT becomes an error, and memory is given back.
mod child;
mod crew;
#[cfg(test)]
mod fake;
mod memory;
mod need;
mod supervise;
mod timings;

pub use child::build_engine;
pub use crew::Crew;
pub use memory::Memory;
pub use need::{Need, parent};
pub use supervise::{BuildEvent, BuildFailure, Supervisor};

use crate::device::Gpu;
use crate::engine_dir::Sizes;
use graphs::DType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Everything a child process needs to build one engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineSpec {
    /// Name of the sub-network.
    pub name: String,
    /// The same for messages, with the rank.
    pub label: String,
    /// The network as text.
    pub network: PathBuf,
    pub library: PathBuf,
    /// Compute capabilities of TensorRT-RTX engines, 89 for sm89.
    pub gpus: Vec<u32>,
    /// TensorRT 10 and later, which builds for the GPU at hand.
    pub local: Option<LocalSpec>,
    /// How much TensorRT tries, 0 to 5; its own choice where nothing is said.
    pub optimization_level: Option<i32>,
    pub sizes: Sizes,
    /// Where the bytes of each weight lie, by `Weight::key` (and `KEY.scale`).
    pub constants: BTreeMap<String, ConstantPlace>,
    /// The engine to write.
    pub engine: PathBuf,
}

/// What a build for the GPU at hand needs besides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LocalSpec {
    /// The compiler of the plugins' kernels.
    pub nvrtc: PathBuf,
    /// Where measurements of earlier builds are kept.
    pub timings: Option<PathBuf>,
}

/// Bytes of one tensor in a file that the child maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConstantPlace {
    pub file: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// Lines that a child writes to its standard output start with this; whatever else appears there is TensorRT's own
/// and goes to the log.
pub const MARK: &str = "@trtvlm ";

/// What a child tells its parent, one JSON line each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChildMessage {
    /// TensorRT reached a step of its outermost phase.
    Progress {
        phase: String,
        step: u32,
        steps: u32,
    },
    Done {
        bytes: u64,
        sha256: String,
        library: String,
        gpu: Option<Gpu>,
        seconds: f64,
        peak_resident_bytes: u64,
    },
    Failed {
        message: String,
        causes: Vec<String>,
        hint: Option<String>,
    },
}

/// An engine that a child wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct BuiltEngine {
    pub bytes: u64,
    pub sha256: String,
    pub library: String,
    /// The GPU that it was built on and for; none for engines of TensorRT-RTX.
    pub gpu: Option<Gpu>,
    pub seconds: f64,
    /// The most memory that the child had for itself, without the files that it maps; sampled five times a second.
    pub peak_own_bytes: u64,
    /// The same with the pages of those files that were in memory, as the system counted it.
    pub peak_resident_bytes: u64,
}

/// A line of a process's status in bytes; 0 where there is none, as for a process that is gone.
pub(crate) fn status_bytes(process: &str, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let found = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    found.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
