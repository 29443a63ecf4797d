//! Runs the networks over samples and keeps statistics of what their linear layers read. Some samples at a time go through
//! all networks, node by node; after each such part the file is written, and a run that was cut off goes on from there.
use super::file::{self, Header, Statistics, StatisticsError};
use super::fingerprint::hex;
use crate::samples::Sample;
use crate::source::{CheckpointValues, ModelSource};
use crate::teach::{Arrays, Lesson, TeachError};
use graphs::interpret::{Seen, sweep};
use graphs::{DType, Op};
use quant::Gathered;
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

#[derive(Clone, Copy, Debug)]
pub struct GatherOptions {
    /// Rows kept of each input.
    pub rows: usize,
    /// Samples that go through the networks together.
    pub together: usize,
    pub dtype: DType,
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
    options: GatherOptions,
    progress: &dyn Fn(u64, u64),
) -> Result<usize, GatherError> {
    let GatherOptions { rows, together, dtype } = options;
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
    let parts = samples.len().div_ceil(together.max(1)) as u64;
    let values = CheckpointValues { source, compute: dtype };
    for part in samples[resumed..].chunks(together.max(1)) {
        let (first, mut nodes) = (header.done, 0);
        // The vision network sees only samples with pictures.
        let seeing = samples[..first].iter().filter(|sample| !sample.pictures.is_empty()).count();
        let mut fault = None;
        let mut run = |name: &str, arrays: Vec<Arrays>| {
            let network = lesson.networks.iter().find(|network| network.name == name);
            let Some(network) = network else { return Ok(arrays) };
            let mut known = BTreeSet::new();
            let mut see = |seen: Seen<'_>| {
                let Seen { position, node, sample, inputs: read } = seen;
                let done = (first / together.max(1)) as u64 * all_nodes as u64 + (nodes + position) as u64;
                if sample == 0 {
                    progress(done, parts * all_nodes as u64);
                }
                let (Op::Linear { .. }, Some(id), Some(Ok(x))) =
                    (&node.op, node.inputs.first(), read.first().map(|read| read.floats()))
                else {
                    return;
                };
                if !known.insert((*id, sample)) {
                    return;
                }
                if x.iter().any(|value| !value.is_finite()) {
                    fault.get_or_insert_with(|| node.path.clone());
                }
                let key = format!("{name}/{}", network.nodes[id.0].path);
                let width = read[0].shape.last().copied().unwrap_or(0);
                let gathered = inputs.entry(key).or_insert_with(|| Gathered::new(width));
                // What a model answers matters more than the many features of its pictures.
                let answers = part.get(sample).filter(|sample| name == "language" && !sample.pictures.is_empty());
                let favored = answers.map_or(usize::MAX, |sample| sample.prompt.len().saturating_sub(1));
                let before = if name == "vision" { seeing } else { first };
                gathered.add(x, (before + sample) as u64, rows, favored);
            };
            let outputs = sweep(network, &values, arrays, &mut see);
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
