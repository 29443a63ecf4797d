//! Recipes: which layer gets which format. Rules are tried in order and the first whose glob matches a layer's path
//! decides; a layer that no rule matches stays as it is.
//!
//! ```toml
//! name = "mine"
//! [[rule]]
//! match = "**.mlp.{gate,up}_proj"
//! format = "int4"
//! group = 128
//! fallback = [64, 32]
//! ```
//! A `base = "PRESET"` beside the name decides where no rule does.
use crate::{PRESETS, QuantError};
use globset::{GlobBuilder, GlobMatcher};
use graphs::Format;
use std::path::Path;

mod text;
use text::FormatText;

/// Groups that presets fall back to where 128 does not divide a layer's width.
const FALLBACK: [usize; 3] = [64, 32, 16];

#[derive(Clone, Debug)]
pub struct Recipe {
    pub name: String,
    rules: Vec<Rule>,
    /// The preset that its last rules are of.
    base: Option<String>,
    preset: bool,
}

#[derive(Clone, Debug)]
struct Rule {
    pattern: String,
    glob: GlobMatcher,
    choice: Choice,
    /// Presets keep what they cannot quantize, and may match nothing; a user's rule means what it says.
    preset: bool,
}

#[derive(Clone, Debug)]
enum Choice {
    None,
    Int8(Method),
    /// The first of these groups that divides the layer's width; empty for one group per output channel.
    Int4 {
        method: Method,
        groups: Vec<usize>,
    },
}

/// How a layer is brought to its format.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Method {
    /// Scales are the largest magnitudes'.
    #[default]
    Nearest,
    /// Scales that lose least of the weights.
    Mse,
    /// AWQ: activations say which channels matter.
    Awq,
    /// SmoothQuant: the inputs are INT8 too. Without an `alpha` that which loses least is searched for.
    Smooth { alpha: Option<f32>, per_token: bool },
    /// Inputs are INT8 by their largest magnitude.
    Absmax { per_token: bool },
}

impl Method {
    /// Whether it needs to have seen the layers' inputs.
    pub fn needs_statistics(self) -> bool {
        !matches!(self, Method::Nearest | Method::Mse | Method::Absmax { per_token: true })
    }

    /// Whether factors move between a layer and what is before it.
    pub fn scales_inputs(self) -> bool {
        matches!(self, Method::Awq | Method::Smooth { .. })
    }

    /// What a recipe's word for it adds to the format's; nothing for the plainest.
    pub fn word(self) -> &'static str {
        match self {
            Method::Nearest => "",
            Method::Mse => "mse",
            Method::Awq => "awq",
            Method::Smooth { per_token: false, .. } => "sq",
            Method::Smooth { per_token: true, .. } => "sq-token",
            Method::Absmax { per_token: false } => "absmax",
            Method::Absmax { per_token: true } => "absmax-token",
        }
    }

    /// Whether inputs are quantized, and then whether each token by itself.
    pub fn quantizes_inputs(self) -> Option<bool> {
        match self {
            Method::Smooth { per_token, .. } | Method::Absmax { per_token } => Some(per_token),
            Method::Nearest | Method::Mse | Method::Awq => None,
        }
    }
}

/// What was chosen for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    pub path: String,
    pub format: Option<Format>,
    pub method: Method,
    /// Number of the deciding rule, from 0.
    pub rule: Option<usize>,
    /// What differs from the rule's word, and why.
    pub note: Option<String>,
}

impl Recipe {
    /// A preset by its name, else a file.
    ///
    /// # Errors
    /// Neither a preset nor a readable recipe.
    pub fn load(name: &str) -> Result<Recipe, QuantError> {
        if let Some(preset) = Recipe::preset(name) {
            return Ok(preset);
        }
        if Path::new(name).extension().is_none_or(|extension| extension != "toml") {
            return Err(QuantError::UnknownPreset { name: name.into() });
        }
        let text = std::fs::read_to_string(name)
            .map_err(|error| QuantError::Recipe { file: name.into(), message: error.to_string() })?;
        Recipe::parse(&text, name)
    }

    /// A format's word (`int4` in groups of 128, smaller where that does not divide); `WORD-gN` for groups of N and
    /// `WORD-channel` for one scale per output where the word is one of INT4. All leave the head as it is.
    pub fn preset(name: &str) -> Option<Recipe> {
        let choice = match FormatText::parse(name) {
            Some(format) => format.choice([&[128][..], &FALLBACK].concat(), None),
            None => {
                let (word, groups) = name.rsplit_once('-')?;
                let groups = match groups.strip_prefix('g') {
                    _ if groups == "channel" => Vec::new(),
                    Some(group) => vec![group.parse().ok().filter(|&group| valid_group(group))?],
                    None => return None,
                };
                FormatText::parse(word).filter(|format| format.has_groups())?.choice(groups, None)
            }
        };
        let rule = |pattern: &str, choice| {
            Some(Rule { pattern: pattern.into(), glob: glob(pattern).ok()?, choice, preset: true })
        };
        let rules = vec![rule("{**.,}lm_head", Choice::None)?, rule("**", choice)?];
        Some(Recipe { name: name.into(), rules, base: Some(name.into()), preset: true })
    }

    /// Whether it is built in, not a user's.
    pub fn is_preset(&self) -> bool {
        self.preset
    }

    /// Which rule it was that decided, for people: ``rule 0 `**.q_proj` `` or ``preset `int4` ``.
    pub fn reason(&self, rule: Option<usize>) -> String {
        let own = |number: usize| Some((number, self.rules.get(number)?));
        match (rule.and_then(own), &self.base) {
            (Some((_, Rule { preset: true, .. })), Some(base)) => format!("preset `{base}`"),
            (Some((number, rule)), _) => format!("rule {number} `{}`", rule.pattern),
            (None, _) => "no rule".into(),
        }
    }
}

fn valid_group(group: usize) -> bool {
    group > 0 && group.is_multiple_of(16) && group <= 65536
}

/// Paths have `.` where globs have `/`.
fn glob(pattern: &str) -> Result<GlobMatcher, globset::Error> {
    let slashed = pattern.replace('.', "/");
    GlobBuilder::new(&slashed).literal_separator(true).build().map(|glob| glob.compile_matcher())
}

/// A pattern of layer paths, as in a recipe's `match`: `*` stands for one part between dots, `**` for any number.
///
/// # Errors
/// What is wrong with the pattern.
pub fn path_glob(pattern: &str) -> Result<impl Fn(&str) -> bool, String> {
    let matcher = glob(pattern).map_err(|error| error.kind().to_string())?;
    Ok(move |path: &str| matcher.is_match(path.replace('.', "/")))
}

/// Chooses a format for each linear layer: path, outputs, inputs.
///
/// # Errors
/// A rule that matches no layer, or a layer that cannot have what a user's rule says.
pub fn assign<'a>(
    recipe: &Recipe,
    linears: impl Iterator<Item = (&'a str, usize, usize)>,
) -> Result<Vec<Assignment>, QuantError> {
    let assignments = assign_part(recipe, linears)?;
    check_used(recipe, &assignments)?;
    Ok(assignments)
}

/// [`assign`] for one of several networks that a recipe is for: rules that match nothing here may be another's.
///
/// # Errors
/// A layer that cannot have what a user's rule says.
pub fn assign_part<'a>(
    recipe: &Recipe,
    linears: impl Iterator<Item = (&'a str, usize, usize)>,
) -> Result<Vec<Assignment>, QuantError> {
    let assign = |(path, outputs, inputs): (&str, usize, usize)| {
        let slashed = path.replace('.', "/");
        let first = recipe.rules.iter().enumerate().find(|(_, rule)| rule.glob.is_match(&slashed));
        let (format, note) = match first {
            Some((_, rule)) => choose(recipe, rule, path, outputs, inputs)?,
            None => (None, None),
        };
        let method = match first.map(|(_, rule)| &rule.choice) {
            Some(Choice::Int8(method) | Choice::Int4 { method, .. }) if format.is_some() => *method,
            _ => Method::Nearest,
        };
        let rule = first.map(|(number, _)| number);
        Ok(Assignment { path: path.into(), format, method, rule, note })
    };
    linears.map(assign).collect()
}

/// Refuses a recipe that does nothing, in whole or in part, to all the layers that it is for.
///
/// # Errors
/// A user's rule that matches no layer, or a preset that quantizes none.
pub fn check_used(recipe: &Recipe, assignments: &[Assignment]) -> Result<(), QuantError> {
    // A rule is of use where an earlier one takes its layers away, too.
    let used = |rule: &Rule| assignments.iter().any(|choice| rule.glob.is_match(choice.path.replace('.', "/")));
    if let Some(rule) = recipe.rules.iter().position(|rule| !rule.preset && !used(rule)) {
        let pattern = recipe.rules[rule].pattern.clone();
        let nearest = nearest(&pattern, assignments);
        return Err(QuantError::RuleUnused { recipe: recipe.name.clone(), rule, pattern, nearest });
    }
    // A preset may do without one of its rules, not without all.
    let wanted = recipe.preset && recipe.rules.iter().any(|rule| !matches!(rule.choice, Choice::None));
    let linears = assignments.len();
    if wanted && linears > 0 && assignments.iter().all(|choice| choice.format.is_none()) {
        let nearest = assignments.iter().find(|choice| choice.note.is_some()).map(|choice| choice.path.clone());
        return Err(QuantError::NothingQuantized { recipe: recipe.name.clone(), linears, nearest });
    }
    Ok(())
}

type Chosen = (Option<Format>, Option<String>);

fn choose(recipe: &Recipe, rule: &Rule, path: &str, outputs: usize, inputs: usize) -> Result<Chosen, QuantError> {
    let groups = match &rule.choice {
        Choice::None => return Ok((None, None)),
        Choice::Int8(_) => return Ok((Some(Format::Int8), None)),
        Choice::Int4 { groups, .. } => groups,
    };
    if !outputs.is_multiple_of(2) {
        let note = format!("kept: {outputs} outputs, int4 wants an even number");
        let refused = QuantError::OddLayer { path: path.into(), found: outputs };
        return if rule.preset { Ok((None, Some(note))) } else { Err(refused) };
    }
    let Some(&first) = groups.first() else { return Ok((Some(Format::Int4 { group: inputs }), None)) };
    match groups.iter().copied().find(|group| inputs.is_multiple_of(*group)) {
        Some(group) if group == first => Ok((Some(Format::Int4 { group }), None)),
        Some(group) => {
            let note = format!("group {group}: {first} does not divide {inputs}");
            Ok((Some(Format::Int4 { group }), Some(note)))
        }
        None if rule.preset && groups.len() > 1 => Ok((None, Some(format!("kept: no group divides {inputs}")))),
        None => Err(QuantError::NoGroup {
            recipe: recipe.name.clone(),
            path: path.into(),
            found: inputs,
            groups: groups.clone(),
        }),
    }
}

/// The path that shares the longest run of whole name parts with the pattern.
fn nearest(pattern: &str, assignments: &[Assignment]) -> Option<String> {
    let parts: Vec<&str> = pattern.split(['.', '*', '{', '}', ',']).filter(|part| !part.is_empty()).collect();
    let shared = |path: &str| path.split('.').filter(|part| parts.contains(part)).count();
    assignments.iter().max_by_key(|choice| shared(&choice.path)).map(|choice| choice.path.clone())
}

/// Names for messages.
pub(crate) fn preset_names() -> String {
    format!("{}, int4-channel, int4-gN (int4-awq-gN, ...)", PRESETS.join(", "))
}

#[cfg(test)]
mod tests;
