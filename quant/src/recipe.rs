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
use crate::{PRESETS, QuantError};
use globset::{GlobBuilder, GlobMatcher};
use graphs::Format;
use serde::Deserialize;
use std::path::Path;
use toml::Spanned;

/// Groups that presets fall back to where 128 does not divide a layer's width.
const FALLBACK: [usize; 3] = [64, 32, 16];

pub struct Recipe {
    pub name: String,
    rules: Vec<Rule>,
    /// Presets keep what they cannot quantize; a user's recipe means what it says.
    preset: bool,
}

struct Rule {
    pattern: String,
    glob: GlobMatcher,
    choice: Choice,
}

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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeText {
    name: String,
    #[serde(default)]
    rule: Vec<RuleText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleText {
    #[serde(rename = "match")]
    pattern: Spanned<String>,
    format: FormatText,
    group: Option<Spanned<usize>>,
    #[serde(default)]
    fallback: Vec<Spanned<usize>>,
    /// Of SmoothQuant.
    alpha: Option<Spanned<f32>>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FormatText {
    None,
    Int8,
    Int4,
    Int8Mse,
    Int4Mse,
    Int8Awq,
    Int4Awq,
    Int8Sq,
    Int8SqToken,
    Int8Absmax,
    Int8AbsmaxToken,
}

impl FormatText {
    fn choice(self, groups: Vec<usize>, alpha: Option<f32>) -> Choice {
        let int4 = |method| Choice::Int4 { method, groups: groups.clone() };
        match self {
            FormatText::None => Choice::None,
            FormatText::Int8 => Choice::Int8(Method::Nearest),
            FormatText::Int8Mse => Choice::Int8(Method::Mse),
            FormatText::Int8Awq => Choice::Int8(Method::Awq),
            FormatText::Int8Sq => Choice::Int8(Method::Smooth { alpha, per_token: false }),
            FormatText::Int8SqToken => Choice::Int8(Method::Smooth { alpha, per_token: true }),
            FormatText::Int8Absmax => Choice::Int8(Method::Absmax { per_token: false }),
            FormatText::Int8AbsmaxToken => Choice::Int8(Method::Absmax { per_token: true }),
            FormatText::Int4 => int4(Method::Nearest),
            FormatText::Int4Mse => int4(Method::Mse),
            FormatText::Int4Awq => int4(Method::Awq),
        }
    }

    fn has_groups(self) -> bool {
        matches!(self, FormatText::Int4 | FormatText::Int4Mse | FormatText::Int4Awq)
    }

    fn has_alpha(self) -> bool {
        matches!(self, FormatText::Int8Sq | FormatText::Int8SqToken)
    }

    fn parse(word: &str) -> Option<FormatText> {
        use serde::de::IntoDeserializer;
        FormatText::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(word)).ok()
    }
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
        let rule = |pattern: &str, choice| Some(Rule { pattern: pattern.into(), glob: glob(pattern).ok()?, choice });
        let rules = vec![rule("{**.,}lm_head", Choice::None)?, rule("**", choice)?];
        Some(Recipe { name: name.into(), rules, preset: true })
    }

    /// # Errors
    /// What does not read as a recipe, with `origin` and the line.
    pub fn parse(text: &str, origin: &str) -> Result<Recipe, QuantError> {
        let fail = |message: String| QuantError::Recipe { file: origin.into(), message };
        let parsed: RecipeText = toml::from_str(text).map_err(|error| fail(error.to_string().trim().to_owned()))?;
        let rule = |(number, rule): (usize, RuleText)| {
            let RuleText { pattern, format, group, fallback, alpha } = rule;
            let place = pattern.span().start;
            let pattern = pattern.into_inner();
            let fail = |place: usize, reason: String| {
                fail(format!("line {}: rule {number} (`{pattern}`): {reason}", line(text, place)))
            };
            let groups: Vec<Spanned<usize>> = group.into_iter().collect();
            let given = groups.iter().chain(&fallback);
            if let (false, Some(group)) = (format.has_groups(), given.clone().next()) {
                return Err(fail(group.span().start, "only `int4` has groups".into()));
            }
            if let Some(alpha) = alpha.iter().find(|alpha| !format.has_alpha() || !(0.0..=1.0).contains(alpha.as_ref()))
            {
                return Err(fail(alpha.span().start, "`alpha` is SmoothQuant's, from 0 to 1".into()));
            }
            if let Some(group) = given.clone().find(|group| !valid_group(*group.as_ref())) {
                let reason = format!("group {}: wanted a multiple of 16 up to 65536", group.as_ref());
                return Err(fail(group.span().start, reason));
            }
            let first = groups.first().map_or(128, |group| *group.as_ref());
            let groups = std::iter::once(first).chain(fallback.iter().map(|group| *group.as_ref())).collect();
            let choice = format.choice(groups, alpha.map(Spanned::into_inner));
            let glob = glob(&pattern).map_err(|error| fail(place, error.kind().to_string()))?;
            Ok(Rule { pattern, glob, choice })
        };
        let rules = parsed.rule.into_iter().enumerate().map(rule).collect::<Result<_, _>>()?;
        Ok(Recipe { name: parsed.name, rules, preset: false })
    }
}

/// Number of the line, from 1, that a byte of the text is on.
fn line(text: &str, place: usize) -> usize {
    1 + text.bytes().take(place).filter(|&byte| byte == b'\n').count()
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
    let mut used = vec![false; recipe.rules.len()];
    let mut assignments = Vec::new();
    for (path, outputs, inputs) in linears {
        let slashed = path.replace('.', "/");
        let matching = recipe.rules.iter().enumerate().filter(|(_, rule)| rule.glob.is_match(&slashed));
        let mut matching = matching.map(|(number, rule)| {
            used[number] = true;
            (number, rule)
        });
        let first = matching.next();
        // Rules after the first that match are of use too: another layer's earlier rule may have taken this one away.
        matching.for_each(drop);
        let (format, note) = match first {
            Some((_, rule)) => choose(recipe, rule, path, outputs, inputs)?,
            None => (None, None),
        };
        let method = match first.map(|(_, rule)| &rule.choice) {
            Some(Choice::Int8(method) | Choice::Int4 { method, .. }) if format.is_some() => *method,
            _ => Method::Nearest,
        };
        let rule = first.map(|(number, _)| number);
        assignments.push(Assignment { path: path.into(), format, method, rule, note });
    }
    let unused = used.iter().position(|used| !used).filter(|_| !recipe.preset);
    if let Some(rule) = unused {
        let pattern = recipe.rules[rule].pattern.clone();
        let nearest = nearest(&pattern, &assignments);
        return Err(QuantError::RuleUnused { recipe: recipe.name.clone(), rule, pattern, nearest });
    }
    // A preset may do without one of its rules, not without all.
    let wanted = recipe.preset && recipe.rules.iter().any(|rule| !matches!(rule.choice, Choice::None));
    let linears = assignments.len();
    if wanted && linears > 0 && assignments.iter().all(|choice| choice.format.is_none()) {
        let nearest = assignments.iter().find(|choice| choice.note.is_some()).map(|choice| choice.path.clone());
        return Err(QuantError::NothingQuantized { recipe: recipe.name.clone(), linears, nearest });
    }
    Ok(assignments)
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
        return if recipe.preset { Ok((None, Some(note))) } else { Err(refused) };
    }
    let Some(&first) = groups.first() else { return Ok((Some(Format::Int4 { group: inputs }), None)) };
    match groups.iter().copied().find(|group| inputs.is_multiple_of(*group)) {
        Some(group) if group == first => Ok((Some(Format::Int4 { group }), None)),
        Some(group) => {
            let note = format!("group {group}: {first} does not divide {inputs}");
            Ok((Some(Format::Int4 { group }), Some(note)))
        }
        None if recipe.preset && groups.len() > 1 => Ok((None, Some(format!("kept: no group divides {inputs}")))),
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
mod tests {
    use super::*;

    const LAYERS: [(&str, usize, usize); 4] = [
        ("model.layers.0.self_attn.q_proj", 576, 576),
        ("model.layers.0.mlp.down_proj", 576, 1536),
        ("model.layers.0.odd", 7, 128),
        ("lm_head", 49152, 576),
    ];

    fn formats(recipe: &Recipe) -> Vec<Option<Format>> {
        assign(recipe, LAYERS.into_iter()).unwrap().into_iter().map(|choice| choice.format).collect()
    }

    #[test]
    fn presets() {
        let int4 = |group| Some(Format::Int4 { group });
        let int8 = Some(Format::Int8);
        assert_eq!(formats(&Recipe::preset("none").unwrap()), [None; 4]);
        assert_eq!(formats(&Recipe::preset("int8").unwrap()), [int8, int8, int8, None]);
        assert_eq!(formats(&Recipe::preset("int4").unwrap()), [int4(64), int4(128), None, None]);
        assert_eq!(formats(&Recipe::preset("int4-g32").unwrap()), [int4(32), int4(32), None, None]);
        assert_eq!(formats(&Recipe::preset("int4-channel").unwrap()), [int4(576), int4(1536), None, None]);
        let notes = assign(&Recipe::preset("int4").unwrap(), LAYERS.into_iter()).unwrap();
        assert_eq!(notes[0].note.as_deref(), Some("group 64: 128 does not divide 576"));
        assert_eq!(notes[2].note.as_deref(), Some("kept: 7 outputs, int4 wants an even number"));
        assert!(["int5", "int4-g", "int4-g7", "int4-g0"].into_iter().all(|name| Recipe::preset(name).is_none()));
    }

    #[test]
    fn methods_come_with_the_words() {
        let methods = |recipe: &Recipe| -> Vec<Method> {
            assign(recipe, LAYERS.into_iter()).unwrap().into_iter().map(|choice| choice.method).collect()
        };
        let of = |name: &str| methods(&Recipe::preset(name).unwrap());
        let (near, smooth) = (Method::Nearest, Method::Smooth { alpha: None, per_token: true });
        assert_eq!(of("int4-awq"), [Method::Awq, Method::Awq, near, near], "none where a layer is kept");
        assert_eq!(of("int8-sq-token"), [smooth, smooth, smooth, near]);
        assert_eq!(of("int4-mse-g64")[0], Method::Mse);
        assert_eq!(formats(&Recipe::preset("int4-awq-g64").unwrap()), formats(&Recipe::preset("int4-g64").unwrap()));
        assert!(
            ["int8-g64", "int8-sq-g64", "int4-awq-g7", "awq"].into_iter().all(|name| Recipe::preset(name).is_none())
        );
        let rule = |rest: &str| Recipe::parse(&format!("name = 'x'\n[[rule]]\nmatch = '**'\n{rest}"), "r.toml");
        let fixed = rule("format = 'int8-sq'\nalpha = 0.85").unwrap();
        assert_eq!(methods(&fixed)[0], Method::Smooth { alpha: Some(0.85), per_token: false });
        for refused in
            ["format = 'int8'\nalpha = 0.5", "format = 'int8-sq'\nalpha = 1.5", "format = 'int8-sq'\ngroup = 64"]
        {
            assert!(rule(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn presets_leave_every_head_and_nothing_else() {
        let paths = ["lm_head", "language_model.lm_head", "a.b.lm_head", "xlm_head", "lm_head.proj", "a.my_lm_head"];
        for name in ["int8", "int4", "int4-g64", "int4-channel"] {
            let linears = paths.iter().map(|path| (*path, 64, 128));
            let choices = assign(&Recipe::preset(name).unwrap(), linears).unwrap();
            let quantized: Vec<bool> = choices.iter().map(|choice| choice.format.is_some()).collect();
            assert_eq!(quantized, [false, false, false, true, true, true], "{name}");
        }
    }

    #[test]
    fn a_lone_group_does_not_fall_back() {
        let error = assign(&Recipe::preset("int4-g128").unwrap(), LAYERS.into_iter()).unwrap_err();
        let wanted =
            "recipe `int4-g128`: layer `model.layers.0.self_attn.q_proj` has 576 inputs, wanted a multiple of [128]";
        assert_eq!(error.to_string(), wanted);
        assert!(error.hint().unwrap().starts_with("groups that divide 576: [64, 32, 16]"));
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let text = "name = 'mine'\n[[rule]]\nmatch = '**.{q,k}_proj'\nformat = 'int8'\n\
                    [[rule]]\nmatch = 'model.layers.*.*.*'\nformat = 'int4'\ngroup = 256\nfallback = [64]";
        let recipe = Recipe::parse(text, "r.toml").unwrap();
        assert_eq!(formats(&recipe), [Some(Format::Int8), Some(Format::Int4 { group: 256 }), None, None]);
    }

    #[test]
    fn errors() {
        let parse = |rule: &str| match Recipe::parse(&format!("name = 'x'\n[[rule]]\n{rule}"), "r.toml") {
            Ok(recipe) => assign(&recipe, LAYERS.into_iter()).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        for (rule, message) in [
            ("match = '**'\nformat = 'int5'", "unknown variant `int5`"),
            ("match = '**'\nformat = 'int8'\ngruop = 3", "unknown field `gruop`"),
            ("match = '**'\nformat = 'int8'\ngruop = 3", "line 5, column 1"),
            ("match = '**'\nformat = 'int8'\ngroup = 32", "r.toml`: line 5: rule 0 (`**`): only `int4` has groups"),
            ("match = '**'\nformat = 'int8'\nfallback = [32]", "line 5: rule 0 (`**`): only `int4` has groups"),
            ("match = '**'\nformat = 'int4'\ngroup = 12", "line 5: rule 0 (`**`): group 12: wanted a multiple of 16"),
            ("match = '**'\nformat = 'int4'\nfallback = [\n64,\n9]", "line 7: rule 0 (`**`): group 9: wanted"),
            ("format = 'int8'\nmatch = '{a'", "line 4: rule 0 (`{a`)"),
            ("match = '**.v_proj'\nformat = 'int8'", "rule 0 (`**.v_proj`) matches no linear layer"),
            ("match = '**.q_proj'\nformat = 'int4'", "layer `model.layers.0.self_attn.q_proj` has 576 inputs"),
            ("match = '**.odd'\nformat = 'int4'", "layer `model.layers.0.odd` has 7 outputs"),
        ] {
            let found = parse(rule);
            assert!(found.contains(message), "{found}");
        }
        let odd = assign(&Recipe::preset("int4").unwrap(), LAYERS[2..].iter().copied()).unwrap_err();
        assert_eq!(odd.to_string(), "recipe `int4` quantizes none of the 2 linear layers");
        assert_eq!(odd.hint().unwrap(), "the nearest layer is `model.layers.0.odd`");
        assert_eq!(Recipe::load("int9").err().unwrap().to_string(), "there is no quantization preset `int9`");
    }
}
