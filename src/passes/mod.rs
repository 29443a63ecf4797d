//! Passes: named functions from a network to a network, in one list, each followed by the verifier.
mod kv_cache;
mod mark;
mod prequantized;
mod quantize;
mod shard;
mod smooth;

pub use mark::MARK;

use crate::calibration::Wanted;
use crate::checkpoint::QuantizedLinear;
use graphs::{Format, GraphError, Network, Op, Weight};
use quant::{Assignment, QuantError, Recipe};
use std::collections::HashMap;
use std::path::PathBuf;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum PassError {
    #[error("quantizing `{network}`")]
    Quantize { network: String, source: QuantError },
    #[error("recipe `{recipe}` wants `{wanted}` for layer `{path}`, which the checkpoint holds as `{found}`")]
    Contradiction { recipe: String, path: String, wanted: Format, found: Format },
    #[error("layer `{path}` reads `{weight}`, which is quantized together with the inputs of its own layer")]
    Bound { path: String, weight: String },
    #[error("pass `{pass}` broke the network")]
    Broken { pass: &'static str, source: GraphError },
    #[error("--tp {ranks}: `{path}`: {reason}")]
    Shard { path: String, ranks: usize, reason: String, possible: Vec<usize> },
    #[error("--mark `{pattern}`: {reason}")]
    Mark { pattern: String, reason: String },
    #[error("cannot write `{path}`")]
    Dump { path: PathBuf, source: std::io::Error },
}

impl PassError {
    pub fn hint(&self) -> Option<String> {
        match self {
            PassError::Quantize { source, .. } => source.hint(),
            PassError::Mark { .. } => Some("`trtvlm plan MODEL -v` lists the paths of the layers with weights".into()),
            PassError::Shard { possible, .. } => {
                Some(format!("--tp may be {}", possible.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")))
            }
            PassError::Contradiction { .. } => {
                Some("leave the recipe out: what the checkpoint has quantized stays as it is".into())
            }
            PassError::Bound { .. } | PassError::Broken { .. } | PassError::Dump { .. } => None,
        }
    }
}

/// What the passes are asked to do with one network.
pub struct Plan<'p> {
    pub recipe: &'p Recipe,
    /// Where the text after each pass is written.
    pub dump: Option<PathBuf>,
    /// Patterns of paths whose results become outputs too.
    pub marks: &'p [String],
    /// Keys and values are kept as INT8.
    pub int8_kv_cache: bool,
    /// Of tensor parallelism: which part of how many.
    pub rank: usize,
    pub ranks: usize,
    /// Ranks have a part of the table of words each, not all of it.
    pub divide_embedding: bool,
    /// What another tool has made of the layer with a weight of this name.
    pub quantized: &'p dyn Fn(&str) -> Option<&'p QuantizedLinear>,
}

impl<'p> Plan<'p> {
    /// The whole network, nothing dumped or marked, of a checkpoint that holds numbers.
    pub fn new(recipe: &'p Recipe) -> Plan<'p> {
        let quantized = &|_: &str| None;
        Plan {
            recipe,
            dump: None,
            marks: &[],
            int8_kv_cache: false,
            rank: 0,
            ranks: 1,
            divide_embedding: true,
            quantized,
        }
    }
}

/// A network after all passes, with what was decided for each of its layers.
#[derive(Debug)]
pub struct Passed {
    pub network: Network,
    pub assignments: Vec<Assignment>,
    /// For each result marked, the pattern that named it.
    pub marked: Vec<String>,
    /// Which part of tensor parallelism it is; 0 where it is whole.
    pub rank: usize,
    /// Vectors that weights name and that are still to be found.
    pub wanted: Vec<Wanted>,
    /// For layers with scaled or quantized inputs the name of the input's statistics, and what it is divided by.
    inputs: HashMap<String, (String, Option<Weight>)>,
}

impl Passed {
    /// For people: the network, and which rank's where it is not the first's.
    pub fn label(&self) -> String {
        let name = &self.network.name;
        if self.rank == 0 { name.clone() } else { format!("{name} rank {}", self.rank) }
    }
}

type Pass = fn(Passed, &Plan<'_>) -> Result<Passed, PassError>;

/// THE list of passes, in order.
const PASSES: &[(&str, Pass)] = &[
    ("prequantized", prequantized::prequantized),
    ("smooth", smooth::smooth),
    ("quantize", quantize::quantize),
    ("kv-cache", kv_cache::kv_cache),
    ("shard", shard::shard),
    ("mark", mark::mark),
];

/// Runs every pass in order.
///
/// # Errors
/// The first pass that fails, or whose result the verifier refuses.
pub fn run(network: Network, plan: &Plan<'_>) -> Result<Passed, PassError> {
    let assignments = assign(&network, plan.recipe)?;
    let (marked, wanted, inputs) = (Vec::new(), Vec::new(), HashMap::new());
    let mut passed = Passed { network, assignments, marked, rank: plan.rank, wanted, inputs };
    for (number, (name, pass)) in PASSES.iter().enumerate() {
        passed = pass(passed, plan)?;
        graphs::verify(&passed.network).map_err(|source| PassError::Broken { pass: name, source })?;
        if let Some(folder) = &plan.dump {
            let path = folder.join(format!("{}-{number}-{name}.txt", passed.network.name));
            let write =
                std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, graphs::print(&passed.network)));
            write.map_err(|source| PassError::Dump { path, source })?;
        }
    }
    Ok(passed)
}

/// Refuses a recipe that does nothing, in whole or in part, to the networks that it is for.
///
/// # Errors
/// A rule that matches nothing, or a layer that cannot have what a rule says.
pub fn check_recipe(recipe: &Recipe, networks: &[&Network]) -> Result<(), PassError> {
    let mut assignments = Vec::new();
    for network in networks {
        assignments.extend(assign(network, recipe)?);
    }
    let names = || networks.iter().map(|network| network.name.as_str()).collect::<Vec<_>>().join("`, `");
    quant::check_used(recipe, &assignments).map_err(|source| PassError::Quantize { network: names(), source })
}

fn assign(network: &Network, recipe: &Recipe) -> Result<Vec<Assignment>, PassError> {
    let linears = network.nodes.iter().filter_map(|node| match &node.op {
        Op::Linear { weight, .. } => match weight.shape()[..] {
            [out, width] => Some((node.path.as_str(), out, width)),
            _ => None,
        },
        _ => None,
    });
    let failed = |source| PassError::Quantize { network: network.name.clone(), source };
    quant::assign_part(recipe, linears).map_err(failed)
}
