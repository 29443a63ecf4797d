//! Runs the networks over samples and keeps statistics of what their linear layers read. Some samples at a time go through
//! all networks, node by node; after each such part the file is written, and a run that was cut off goes on from there.
use super::file::{self, Header, Statistics, StatisticsError};
use super::fingerprint::hex;
use super::gpu::{self, Machine};
use crate::samples::Sample;
use crate::source::{CheckpointValues, ModelSource};
use crate::teach::{Arrays, Lesson, TeachError};
use graphs::interpret::{Seen, sweep};
use graphs::{Axis, DType, Dim, Network, Node, NodeId, Op};
use quant::{Gathered, Share};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum GatherError {
    #[error(transparent)]
    Teach(#[from] TeachError),
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    #[error("a value that `{path}` reads is not finite")]
    NotFinite { path: String },
}

impl GatherError {
    pub fn hint(&self) -> Option<String> {
        match self {
            GatherError::Statistics(error) => error.hint(),
            GatherError::NotFinite { .. } => Some("the checkpoint is damaged, or its config is another's".into()),
            GatherError::Teach(_) => None,
        }
    }
}

#[derive(Clone, Copy)]
pub struct GatherOptions<'g> {
    /// Rows kept of each input.
    pub rows: usize,
    /// Samples that go through the networks together; on a GPU as many as its memory holds where it is not said.
    pub together: Option<usize>,
    pub dtype: DType,
    /// Computes in the CPU's place.
    pub machine: Option<&'g Machine>,
}

/// Samples that go through the networks together on the CPU, and at most on a GPU.
const TOGETHER: usize = 16;
const TOGETHER_ON_GPU: usize = 128;
/// Numerator of how much of a GPU's memory values may take, of 8; products and fragments need the rest.
const SHARE: usize = 5;

/// As many samples as a GPU's memory holds the values of, which are alive at once.
fn fitting(machine: &Machine, networks: &[&Network], samples: &[Sample]) -> usize {
    let longest = samples.iter().map(|sample| sample.prompt.len() + sample.answer.len()).max().unwrap_or(1);
    let pictures = samples.iter().map(|sample| sample.pictures.len()).max().unwrap_or(0).max(1);
    let size = |dim: &Dim| match dim {
        Dim::Fixed(size) => *size,
        Dim::Named(Axis::Batch) => 1,
        Dim::Named(_) => longest,
    };
    let most = |network: &&Network| {
        let last_use = network.last_use();
        let batch = if network.name == "vision" { pictures } else { 1 };
        let floats = |node: &Node| batch * node.ty.shape.iter().map(size).product::<usize>();
        let (mut alive, mut most) = (0usize, 0);
        for (position, node) in network.nodes.iter().enumerate() {
            alive += floats(node);
            // Queries and keys are turned beside the values themselves.
            most = most.max(if matches!(node.op, Op::Attention(_)) { alive + 2 * floats(node) } else { alive });
            let dead: BTreeSet<NodeId> = node.inputs.iter().filter(|id| last_use[id.0] == position).copied().collect();
            alive -= dead.iter().map(|id| floats(&network.nodes[id.0])).sum::<usize>();
        }
        most
    };
    let bytes = 4 * networks.iter().map(most).max().unwrap_or(1).max(1);
    (machine.free_memory() / 8 * SHARE / bytes).clamp(1, TOGETHER_ON_GPU)
}

/// What is written while samples are left.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// Writes the file; `progress` is told the nodes done and of all. Gives the number of samples that an earlier run had done.
///
/// # Errors
/// Samples that do not fit the model, weights that cannot be read, a failing write.
pub fn gather(
    path: &Path,
    lesson: &Lesson<'_>,
    source: &ModelSource,
    model: String,
    samples: &[Sample],
    options: GatherOptions<'_>,
    progress: &dyn Fn(u64, u64),
) -> Result<usize, GatherError> {
    let GatherOptions { rows, dtype, machine, .. } = options;
    let together = options.together.unwrap_or_else(|| match machine {
        Some(machine) => fitting(machine, &lesson.networks, samples),
        None => TOGETHER,
    });
    let together = together.max(1);
    let counts = BTreeMap::new();
    let mut header = Header { model, data: digest(samples), dtype, samples: samples.len(), done: 0, rows, counts };
    let mut inputs = BTreeMap::new();
    let partial = unfinished(path);
    if let Ok(earlier) = Statistics::open(&partial) {
        let Header { done, counts, .. } = earlier.header.clone();
        let same = Header { done: 0, counts: BTreeMap::new(), ..earlier.header.clone() } == header;
        if same && done <= samples.len() {
            for input in counts.keys() {
                inputs.insert(input.clone(), earlier.gathered(input)?);
            }
            header.done = done;
        }
    }
    let resumed = header.done;
    let all_nodes: usize = lesson.networks.iter().map(|network| network.nodes.len()).sum();
    let parts = samples.len().div_ceil(together) as u64;
    let values = CheckpointValues { source, compute: dtype };
    for part in samples[resumed..].chunks(together) {
        let (first, mut nodes) = (header.done, 0);
        // The vision network sees only samples with pictures.
        let seeing = samples[..first].iter().filter(|sample| !sample.pictures.is_empty()).count();
        let mut fault = None;
        let mut run = |name: &str, arrays: Vec<Arrays>| {
            let network = lesson.networks.iter().find(|network| network.name == name);
            let Some(network) = network else { return Ok(arrays) };
            let before = if name == "vision" { seeing } else { first };
            // What a model answers matters more than the many features of its pictures.
            let share = |sample: usize, rows: usize| {
                let answers = part.get(sample).filter(|sample| name == "language" && !sample.pictures.is_empty());
                let favored = answers.map_or(usize::MAX, |sample| sample.prompt.len().saturating_sub(1));
                Share { sample: (before + sample) as u64, rows, favored }
            };
            let tell = |position: usize| {
                let done = (first / together) as u64 * all_nodes as u64 + (nodes + position) as u64;
                progress(done, parts * all_nodes as u64);
            };
            let key = |id: &NodeId| format!("{name}/{}", network.nodes[id.0].path);
            let mut known = BTreeSet::new();
            let outputs = match machine {
                None => {
                    let mut see = |seen: Seen<'_>| {
                        let Seen { position, node, sample, inputs: read } = seen;
                        if sample == 0 {
                            tell(position);
                        }
                        let (Op::Linear { .. }, Some(id), Some(Ok(x))) =
                            (&node.op, node.inputs.first(), read.first().map(|read| read.floats()))
                        else {
                            return;
                        };
                        if !known.insert((*id, sample)) {
                            return;
                        }
                        if x.par_chunks(1 << 16).any(|values| values.iter().any(|value| !value.is_finite())) {
                            fault.get_or_insert_with(|| node.path.clone());
                        }
                        let width = read[0].shape.last().copied().unwrap_or(0);
                        let gathered = inputs.entry(key(id)).or_insert_with(|| Gathered::new(width));
                        gathered.add(x, share(sample, x.len() / width.max(1)), rows);
                    };
                    sweep(network, &values, arrays, &mut see)
                }
                Some(machine) => {
                    let mut see = |position: usize, node: &Node, x: Option<&gpu::Value>| {
                        tell(position);
                        let (Op::Linear { .. }, Some(id), Some(x)) = (&node.op, node.inputs.first(), x) else {
                            return Ok(());
                        };
                        if !known.insert((*id, 0)) {
                            return Ok(());
                        }
                        let (absmax, sum) = x.columns(machine)?;
                        if absmax.iter().any(|value| !value.is_finite()) {
                            fault.get_or_insert_with(|| node.path.clone());
                        }
                        let gathered = inputs.entry(key(id)).or_insert_with(|| Gathered::new(absmax.len()));
                        let counts = x.rows();
                        let shares: Vec<Share> =
                            counts.iter().enumerate().map(|(sample, rows)| share(sample, *rows)).collect();
                        let kept = gathered.choose(&shares, rows);
                        let found = x.some(machine, kept.iter().map(|kept| (kept.share, kept.row)))?;
                        let count = counts.iter().sum::<usize>() as u64;
                        let found = std::iter::zip(kept.iter().map(|kept| kept.lot), found);
                        gathered.join(count, &absmax, &sum, found, rows);
                        Ok(())
                    };
                    gpu::sweep(machine, network, source, dtype, arrays, &mut see)
                }
            };
            nodes += network.nodes.len();
            outputs
        };
        lesson.teach(part, &mut run)?;
        if let Some(path) = fault {
            return Err(GatherError::NotFinite { path });
        }
        header.done += part.len();
        header.counts =
            inputs.iter().map(|(input, gathered): (&String, &Gathered)| (input.clone(), gathered.count)).collect();
        file::write(&partial, &header, &inputs)?;
    }
    std::fs::rename(&partial, path)
        .map_err(|error| StatisticsError::File { path: path.into(), reason: error.to_string() })?;
    Ok(resumed)
}

fn digest(samples: &[Sample]) -> String {
    let mut hash = Sha256::new();
    for sample in samples {
        hash.update(format!("{:?} {:?}\n", sample.prompt, sample.answer));
        for picture in &sample.pictures {
            hash.update(&picture.rgb);
        }
    }
    hex(&hash.finalize())
}
