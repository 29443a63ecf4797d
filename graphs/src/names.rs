//! Which tensor of a checkpoint a canonical name means, in whatever spelling the file has.
use crate::models::Alias;
use crate::{Model, Network};
use std::collections::{BTreeMap, BTreeSet};

/// Canonical names and the file's names for them.
#[derive(Debug, Default, PartialEq)]
pub struct Coverage {
    /// Canonical name to the name in the file.
    pub found: BTreeMap<String, String>,
    /// Canonical names that the file lacks.
    pub missing: Vec<String>,
    /// Names of the file that no network reads and the model does not expect to lie unused.
    pub unused: Vec<String>,
    /// Names of the file that the model knows and does not need.
    pub ignored: Vec<String>,
}

/// Matches what the networks read with what a file holds.
pub fn cover<'n>(model: &Model, networks: &[Network], file: impl Iterator<Item = &'n str>) -> Coverage {
    let file: BTreeSet<&str> = file.collect();
    let aliases = model.aliases();
    let wanted: BTreeSet<&str> = networks
        .iter()
        .flat_map(Network::weights)
        .flat_map(|(_, weight)| weight.tensors())
        .map(|(name, _)| name)
        .collect();
    let mut coverage = Coverage::default();
    for name in wanted {
        match spellings(name, aliases).find(|spelling| file.contains(spelling.as_str())) {
            Some(spelling) => drop(coverage.found.insert(name.into(), spelling)),
            None => coverage.missing.push(name.into()),
        }
    }
    let used: BTreeSet<&str> = coverage.found.values().map(String::as_str).collect();
    for name in file.difference(&used) {
        let known = canonical(name, aliases).any(|canonical| model.ignores(&canonical));
        let list = if known { &mut coverage.ignored } else { &mut coverage.unused };
        list.push((*name).into());
    }
    coverage
}

/// The canonical name itself, then its other spellings.
fn spellings<'a>(name: &'a str, aliases: &'a [Alias]) -> impl Iterator<Item = String> + 'a {
    let other = |&(from, to): &Alias| name.strip_prefix(from).map(|rest| format!("{to}{rest}"));
    std::iter::once(name.to_string()).chain(aliases.iter().filter_map(other))
}

fn canonical<'a>(name: &'a str, aliases: &'a [Alias]) -> impl Iterator<Item = String> + 'a {
    let other = |&(to, from): &Alias| name.strip_prefix(from).map(|rest| format!("{to}{rest}"));
    std::iter::once(name.to_string()).chain(aliases.iter().filter_map(other))
}
