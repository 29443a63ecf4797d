//! `auto:BITS`: a format for each layer by what the layer loses, so that all of them together keep to a mean size. What
//! comes out is an ordinary recipe.
//!
//! Every candidate format is tried on the whole model, rounded to nearest, and its layers are measured as a report measures
//! them: searches for factors and scales, which take many times as long, win back about the same part of the error
//! everywhere, so they are left to the recipe's own use. Layers that read one value take one format where their factors
//! are searched for together.
use crate::calibration::SearchError;
use crate::checkpoint::Options;
use crate::compile::{Chosen, CompileError, Compiled, Request, compile};
use crate::quality::{self, Layer};
use graphs::{Network, Op, Weight};
use quant::{Price, Recipe, allot};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// Groups of INT4 that are tried where they divide a layer's width.
const GROUPS: [usize; 4] = [128, 64, 32, 16];

/// Smaller groups are tried only where none of the larger does.
const COMMON: usize = 3;

const PREFIX: &str = "auto:";

#[derive(Debug, Error)]
pub enum MixedError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error(transparent)]
    Search(#[from] SearchError),
    #[error("`{name}`: wanted a number of bits from 1 to 32 behind the colon")]
    Bits { name: String },
    #[error("`{name}`: the {layers} layers take {fewest:.3} bits a weight at least")]
    TooFew { name: String, layers: usize, fewest: f64 },
    #[error("`{name}`: there is no layer to quantize in the {part} part")]
    NoLayers { name: String, part: &'static str },
}

impl MixedError {
    pub fn hint(&self) -> Option<String> {
        match self {
            MixedError::Compile(error) => error.hint(),
            MixedError::Search(error) => error.hint(),
            MixedError::Bits { .. } => Some("as in `auto:5.5`, scales counted".into()),
            MixedError::TooFew { fewest, .. } => Some(format!("ask for `auto:{:.2}` or more", fewest + 0.005)),
            MixedError::NoLayers { .. } => Some("leave it out for this part".into()),
        }
    }
}

/// Which networks a recipe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All but the vision network.
    Language,
    Vision,
}

impl Part {
    pub fn name(self) -> &'static str {
        match self {
            Part::Language => "language",
            Part::Vision => "vision",
        }
    }

    fn holds(self, network: &str) -> bool {
        (network == "vision") == (self == Part::Vision)
    }
}

/// A recipe that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed {
    /// As a file would have it.
    pub text: String,
    /// Mean bits of a weight of the layers that could be quantized, and how many layers these are.
    pub bits: f64,
    pub layers: usize,
}

/// The bits that a name asks for; `None` where it is the name of something else.
///
/// # Errors
/// What is no number of bits.
pub fn wanted(name: &str) -> Result<Option<f64>, MixedError> {
    let Some(text) = name.strip_prefix(PREFIX) else { return Ok(None) };
    let bits = text.parse().ok().filter(|bits: &f64| (1.0..=32.0).contains(bits));
    bits.map(Some).ok_or_else(|| MixedError::Bits { name: name.into() })
}

/// What one layer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Candidate {
    Plain,
    Int8,
    /// AWQ where there are statistics, else scales that lose least of the weights.
    Int4 {
        group: usize,
        calibrated: bool,
    },
}

/// A layer that may be quantized.
#[derive(Clone, Debug)]
struct Subject {
    network: String,
    path: String,
    /// Layers of one unit are decided together.
    unit: usize,
    outputs: usize,
    inputs: usize,
    calibrated: bool,
    /// Where ranks cut it: axis, start and end.
    cuts: Vec<(usize, usize, usize)>,
}

impl Subject {
    fn candidates(&self) -> Vec<Candidate> {
        let mut found = vec![Candidate::Plain, Candidate::Int8];
        // A byte of INT4 holds two outputs, and ranks get whole groups or parts of one.
        let pairs = self.cuts.iter().all(|(axis, start, end)| *axis == 1 || (start % 2 == 0 && end % 2 == 0));
        if self.outputs.is_multiple_of(2) && pairs {
            let whole = |group: usize| {
                let cut = |(axis, start, end): &(usize, usize, usize)| {
                    *axis == 0 || graphs::group_of_part(*start, *end, group).is_some()
                };
                self.cuts.iter().all(cut)
            };
            let divides = |group: &usize| self.inputs.is_multiple_of(*group) && whole(*group);
            let common: Vec<usize> = GROUPS[..COMMON].iter().copied().filter(divides).collect();
            let groups = if common.is_empty() { GROUPS.into_iter().filter(divides).collect() } else { common };
            let calibrated = self.calibrated;
            found.extend(groups.into_iter().map(|group| Candidate::Int4 { group, calibrated }));
        }
        found
    }
}

/// Chooses for one part of what is asked for. `progress` is told parts done and their number.
///
/// # Errors
/// Fewer bits than there are, a part without layers, whatever keeps the model from being compiled or measured.
pub fn choose(
    request: &Request,
    part: Part,
    bits: f64,
    options: &Options<'_>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Mixed, MixedError> {
    let name = match part {
        Part::Language => &request.quant,
        Part::Vision => &request.vision_quant,
    };
    let quantized = |text: Option<String>, tp: usize| -> Result<Compiled, MixedError> {
        let none = || "none".to_owned();
        let mut chosen = Chosen::default();
        match part {
            Part::Language => chosen.language = text,
            Part::Vision => chosen.vision = text,
        }
        let request = Request { quant: none(), vision_quant: none(), chosen, tp, dump: None, ..request.clone() };
        let mut compiled = compile(&request, options)?;
        if let Some(statistics) = &request.calibration {
            compiled.open_statistics(statistics)?;
        }
        Ok(compiled)
    };
    let plain = quantized(None, 1)?;
    let (mut subjects, paths) = (subjects(&plain, part), linears(&plain, part));
    drop(plain);
    if request.tp > 1 {
        cut(&mut subjects, &quantized(None, request.tp)?);
    }
    if subjects.is_empty() {
        return Err(MixedError::NoLayers { name: name.clone(), part: part.name() });
    }
    let all: BTreeSet<Candidate> = subjects.iter().flat_map(Subject::candidates).collect();
    let formats: Vec<Candidate> = all.into_iter().filter(|candidate| *candidate != Candidate::Plain).collect();
    // One candidate after the other, each for all layers that can take it.
    let mut measured: BTreeMap<(&str, &str), BTreeMap<Candidate, Layer>> = BTreeMap::new();
    for (number, format) in formats.iter().enumerate() {
        let takes = |subject: &&Subject| subject.candidates().contains(format);
        let choices: Vec<(&Subject, Candidate)> = subjects.iter().filter(takes).map(|own| (own, *format)).collect();
        let compiled = quantized(Some(recipe("candidate", &choices, &paths, true)), 1)?;
        let part = |done: u64, total: u64| {
            progress(number as u64 * 100 + done * 100 / total.max(1), formats.len() as u64 * 100);
        };
        let layers = quality::measure(&compiled, &part)?;
        for (subject, _) in choices {
            let own = layers.iter().find(|layer| layer.path == subject.path && layer.network == subject.network);
            if let Some(layer) = own {
                measured.entry((&subject.network, &subject.path)).or_default().insert(*format, layer.clone());
            }
        }
    }
    // Units with what each of their common candidates costs and loses.
    let units = subjects.iter().map(|subject| subject.unit).max().map_or(0, |last| last + 1);
    let mut options: Vec<BTreeMap<Candidate, Price>> = vec![BTreeMap::new(); units];
    for (unit, options) in options.iter_mut().enumerate() {
        let members: Vec<&Subject> = subjects.iter().filter(|subject| subject.unit == unit).collect();
        let first = members.first().map(|subject| subject.candidates()).unwrap_or_default();
        for candidate in first {
            let prices = members.iter().map(|subject| {
                let known = measured.get(&(subject.network.as_str(), subject.path.as_str()))?;
                price(candidate, known)
            });
            if let Some(prices) = prices.collect::<Option<Vec<Price>>>() {
                let cost = prices.iter().map(|price| price.cost).sum();
                options.insert(candidate, Price { cost, loss: prices.iter().map(|price| price.loss).sum() });
            }
        }
    }
    let weights: u64 = subjects.iter().map(|subject| (subject.outputs * subject.inputs) as u64).sum();
    let prices: Vec<Vec<Price>> = options.iter().map(|options| options.values().copied().collect()).collect();
    let Some(found) = allot(&prices, budget(bits, weights)) else {
        let fewest: u64 = prices.iter().filter_map(|prices| prices.iter().map(|price| price.cost).min()).sum();
        let (layers, fewest) = (subjects.len(), fewest as f64 / weights as f64);
        return Err(MixedError::TooFew { name: name.clone(), layers, fewest });
    };
    let candidate = |unit: usize| options[unit].keys().nth(found[unit]).copied().unwrap_or(Candidate::Plain);
    let choices: Vec<(&Subject, Candidate)> = subjects.iter().map(|own| (own, candidate(own.unit))).collect();
    let cost: u64 = std::iter::zip(&prices, &found).map(|(prices, option)| prices[*option].cost).sum();
    let bits = cost as f64 / weights as f64;
    Ok(Mixed { text: recipe(name, &choices, &paths, false), bits, layers: subjects.len() })
}

/// Bits for so many weights. What people write with a point may be a little less in binary, and then lack a whole bit.
fn budget(bits: f64, weights: u64) -> u64 {
    (bits * weights as f64 * (1.0 + 4.0 * f64::EPSILON)) as u64
}

/// Bits that a layer takes as a candidate, and the square of its relative error.
fn price(candidate: Candidate, measured: &BTreeMap<Candidate, Layer>) -> Option<Price> {
    if candidate == Candidate::Plain {
        let bytes = measured.values().next()?.bytes_before;
        return Some(Price { cost: 8 * bytes, loss: 0.0 });
    }
    let layer = measured.get(&candidate)?;
    Some(Price { cost: 8 * layer.bytes_after, loss: layer.error().powi(2) })
}

/// The layers that presets would quantize.
fn subjects(compiled: &Compiled, part: Part) -> Vec<Subject> {
    let Some(preset) = Recipe::preset("int8") else { return Vec::new() };
    let mut subjects: Vec<Subject> = Vec::new();
    let mut units = 0;
    for passed in compiled.networks.iter().filter(|passed| part.holds(&passed.network.name)) {
        let network = &passed.network;
        let mut shared = BTreeMap::new();
        for node in &network.nodes {
            let (Op::Linear { weight, .. }, Some(&input)) = (&node.op, node.inputs.first()) else { continue };
            let &[outputs, inputs] = &weight.shape()[..] else { continue };
            let linear = std::iter::once((node.path.as_str(), outputs, inputs));
            let kept =
                quant::assign_part(&preset, linear).is_ok_and(|choices| choices.iter().all(|c| c.format.is_none()));
            // What the checkpoint brings quantized stays so; what one path names in two networks is one layer.
            if kept || weight.format().is_some() || subjects.iter().any(|known| known.path == node.path) {
                continue;
            }
            let calibrated = seen(compiled, network, input);
            let unit = match shared.get(&input) {
                Some(unit) if calibrated => *unit,
                _ => {
                    units += 1;
                    shared.insert(input, units - 1);
                    units - 1
                }
            };
            let (network, path) = (network.name.clone(), node.path.clone());
            subjects.push(Subject { network, path, unit, outputs, inputs, calibrated, cuts: Vec::new() });
        }
    }
    subjects
}

/// Paths of all linear layers, those that nothing is chosen for too.
fn linears(compiled: &Compiled, part: Part) -> BTreeSet<String> {
    let networks = compiled.networks.iter().filter(|passed| part.holds(&passed.network.name));
    let nodes = networks.flat_map(|passed| &passed.network.nodes);
    nodes.filter(|node| matches!(node.op, Op::Linear { .. })).map(|node| node.path.clone()).collect()
}

/// Notes where the ranks of a divided model cut its layers.
fn cut(subjects: &mut [Subject], divided: &Compiled) {
    let mut places: BTreeMap<String, &mut Subject> =
        subjects.iter_mut().map(|subject| (subject.path.clone(), subject)).collect();
    for node in divided.networks.iter().flat_map(|passed| &passed.network.nodes) {
        let (Op::Linear { weight, .. }, Some(subject)) = (&node.op, places.get_mut(node.path.as_str())) else {
            continue;
        };
        let mut weight = weight;
        while let Weight::Slice { axis, start, end, of } = weight {
            subject.cuts.push((*axis, *start, *end));
            weight = of;
        }
    }
}

fn seen(compiled: &Compiled, network: &Network, input: graphs::NodeId) -> bool {
    let key = network.node(input).map(|node| format!("{}/{}", network.name, node.path));
    key.is_some_and(|key| compiled.statistics().is_some_and(|statistics| statistics.has(&key)))
}

/// The text of a recipe: layers whose paths differ in their first number alone share a rule. `all` are the paths of
/// layers, of which it must not name too many. For a `trial` all is rounded to nearest.
fn recipe(name: &str, choices: &[(&Subject, Candidate)], all: &BTreeSet<String>, trial: bool) -> String {
    let mut rules: Vec<((String, String), Candidate, BTreeSet<u64>)> = Vec::new();
    for (subject, candidate) in choices.iter().filter(|(_, candidate)| *candidate != Candidate::Plain) {
        let (around, number) = numbered(&subject.path);
        match rules.iter_mut().find(|rule| rule.0 == around && rule.1 == *candidate) {
            Some(rule) => rule.2.extend(number),
            None => rules.push((around, *candidate, number.into_iter().collect())),
        }
    }
    let mut text = format!("name = \"{name}\"\n");
    for ((before, after), candidate, numbers) in rules {
        let known = all.iter().map(|path| numbered(path));
        let known: BTreeSet<u64> =
            known.filter(|(around, _)| *around == (before.clone(), after.clone())).filter_map(|(_, own)| own).collect();
        let list = || numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let middle = match numbers.len() {
            0 => String::new(),
            1 => list(),
            _ if numbers == known => "*".into(),
            _ => format!("{{{}}}", list()),
        };
        text += &format!("[[rule]]\nmatch = \"{before}{middle}{after}\"\n");
        text += &match candidate {
            Candidate::Plain => "format = \"none\"\n".into(),
            Candidate::Int8 => "format = \"int8\"\n".into(),
            Candidate::Int4 { group, calibrated } => {
                let method = match (trial, calibrated) {
                    (true, _) => "",
                    (false, true) => "-awq",
                    (false, false) => "-mse",
                };
                format!("format = \"int4{method}\"\ngroup = {group}\n")
            }
        };
    }
    text
}

/// What is around the first number of a path, and the number.
fn numbered(path: &str) -> ((String, String), Option<u64>) {
    let mut at = 0;
    for part in path.split('.') {
        let end = at + part.len();
        // A number that is written otherwise than numbers are stays a part of the text.
        if let Some(number) = part.parse::<u64>().ok().filter(|number| number.to_string() == part) {
            return ((path[..at].to_owned(), path[end..].to_owned()), Some(number));
        }
        at = end + 1;
    }
    ((path.to_owned(), String::new()), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(path: &str, outputs: usize, inputs: usize) -> Subject {
        let (network, path) = ("language".into(), path.into());
        Subject { network, path, unit: 0, outputs, inputs, calibrated: true, cuts: Vec::new() }
    }

    #[test]
    fn names() {
        assert_eq!(wanted("auto:5.5").unwrap(), Some(5.5));
        assert_eq!(wanted("int4").unwrap(), None);
        for name in ["auto:", "auto:x", "auto:0.5", "auto:NaN", "auto:33"] {
            assert!(wanted(name).is_err(), "{name}");
        }
    }

    /// 4.35 times 100 is less than 435.
    #[test]
    fn budgets_are_what_was_written() {
        assert_eq!(
            [budget(4.35, 100), budget(5.8, 23_040), budget(1.0, 7), budget(4.349, 100)],
            [435, 133_632, 7, 434]
        );
    }

    #[test]
    fn candidates_fit_their_layers() {
        let int4 = |group| Candidate::Int4 { group, calibrated: true };
        let of = |outputs, inputs| subject("x", outputs, inputs).candidates();
        assert_eq!(of(4, 576), [Candidate::Plain, Candidate::Int8, int4(64), int4(32)]);
        assert_eq!(of(4, 48), [Candidate::Plain, Candidate::Int8, int4(16)], "small ones only where they must be");
        assert_eq!(of(3, 128), [Candidate::Plain, Candidate::Int8]);
        assert_eq!(of(4, 40), [Candidate::Plain, Candidate::Int8]);
        let cut = |cuts: &[(usize, usize, usize)]| Subject { cuts: cuts.to_vec(), ..subject("x", 4, 192) }.candidates();
        assert_eq!(cut(&[(1, 0, 96), (1, 96, 192)]), [Candidate::Plain, Candidate::Int8, int4(32)]);
        assert_eq!(cut(&[(1, 0, 48), (1, 48, 96)]), [Candidate::Plain, Candidate::Int8, int4(16)]);
        assert_eq!(cut(&[(0, 0, 1), (0, 1, 4)]), [Candidate::Plain, Candidate::Int8], "no half bytes");
    }

    /// Whatever is chosen, the recipe gives it to the layers again and to no others.
    #[test]
    fn recipes_say_what_was_chosen() {
        let paths = ["a.0.q", "a.1.q", "a.2.q", "a.0.k", "a.1.k", "head", "b.0.c.1.q", "b.1.c.1.q", "b.1.c.2.q"];
        let all: Vec<Subject> = paths.iter().map(|path| subject(path, 4, 256)).collect();
        let known: BTreeSet<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let formats = [
            Candidate::Plain,
            Candidate::Int8,
            Candidate::Int4 { group: 64, calibrated: true },
            Candidate::Int4 { group: 128, calibrated: false },
        ];
        for seed in 0..50usize {
            let pick = |at: usize| formats[(seed * 7919 + at * (seed + 13)) / 3 % 4];
            let choices: Vec<(&Subject, Candidate)> =
                all.iter().enumerate().map(|(at, subject)| (subject, pick(at))).collect();
            let text = recipe("auto:5", &choices, &known, false);
            let parsed = Recipe::parse(&text, "r.toml").unwrap();
            let found = quant::assign(&parsed, paths.iter().map(|path| (*path, 4, 256))).unwrap();
            for (found, (_, wanted)) in std::iter::zip(&found, &choices) {
                let format = match wanted {
                    Candidate::Plain => None,
                    Candidate::Int8 => Some((graphs::Format::Int8, quant::Method::Nearest)),
                    Candidate::Int4 { group, calibrated: true } => {
                        Some((graphs::Format::Int4 { group: *group }, quant::Method::Awq))
                    }
                    Candidate::Int4 { group, .. } => Some((graphs::Format::Int4 { group: *group }, quant::Method::Mse)),
                };
                assert_eq!(found.format.map(|format| (format, found.method)), format, "{}: {text}", found.path);
            }
        }
        let same: Vec<(&Subject, Candidate)> = all[..3].iter().map(|own| (own, Candidate::Int8)).collect();
        assert_eq!(recipe("x", &same, &known, false), "name = \"x\"\n[[rule]]\nmatch = \"a.*.q\"\nformat = \"int8\"\n");
        // A layer of the row that nothing is chosen for.
        let more = known.iter().cloned().chain(["a.3.q".to_owned()]).collect();
        assert!(recipe("x", &same, &more, false).contains("\"a.{0,1,2}.q\""));
        assert!(recipe("x", &same[..2], &known, false).contains("\"a.{0,1}.q\""));
    }
}
