//! Recipes as text: what a file may say.
use super::{Choice, Method, Recipe, Rule, glob, valid_group};
use crate::QuantError;
use serde::Deserialize;
use toml::Spanned;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeText {
    name: String,
    /// A preset that decides where no rule does.
    base: Option<Spanned<String>>,
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
pub(super) enum FormatText {
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
    pub(super) fn choice(self, groups: Vec<usize>, alpha: Option<f32>) -> Choice {
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

    pub(super) fn has_groups(self) -> bool {
        matches!(self, FormatText::Int4 | FormatText::Int4Mse | FormatText::Int4Awq)
    }

    fn has_alpha(self) -> bool {
        matches!(self, FormatText::Int8Sq | FormatText::Int8SqToken)
    }

    pub(super) fn parse(word: &str) -> Option<FormatText> {
        use serde::de::IntoDeserializer;
        FormatText::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(word)).ok()
    }
}

impl Recipe {
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
            Ok(Rule { pattern, glob, choice, preset: false })
        };
        let mut rules = parsed.rule.into_iter().enumerate().map(rule).collect::<Result<Vec<_>, _>>()?;
        if let Some(base) = &parsed.base {
            let refused = || {
                let line = line(text, base.span().start);
                fail(format!("line {line}: there is no quantization preset `{}`", base.as_ref()))
            };
            rules.extend(Recipe::preset(base.as_ref()).ok_or_else(refused)?.rules);
        }
        let base = parsed.base.map(Spanned::into_inner);
        Ok(Recipe { name: parsed.name, rules, base, preset: false })
    }
}

/// Number of the line, from 1, that a byte of the text is on.
fn line(text: &str, place: usize) -> usize {
    1 + text.bytes().take(place).filter(|&byte| byte == b'\n').count()
}
