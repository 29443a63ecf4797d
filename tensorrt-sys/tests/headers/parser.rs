//! Reads classes with virtual methods, and enums, from TensorRT's public headers.
//!
//! Only what those headers use is understood: single inheritance, no virtual templates.

use crate::tokens::{after_bracket, tokens};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const FILES: [&str; 7] = [
    "NvInferRuntimeBase.h",
    "NvInferPluginBase.h",
    "NvInferRuntimePlugin.h",
    "NvInferRuntimeCommon.h",
    "NvInferImpl.h",
    "NvInferRuntime.h",
    "NvInfer.h",
];
const ATTRIBUTES: [&str; 5] =
    ["TRT_DEPRECATED", "TRT_DEPRECATED_API", "TRT_DEPRECATED_ENUM", "TRT_NODISCARD", "TENSORRTAPI"];
const KEYWORDS: [&str; 9] = ["const", "int", "char", "bool", "float", "double", "unsigned", "void", "size_t"];

/// One slot of a virtual table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Method {
    pub name: String,
    pub returns: String,
    pub parameters: Vec<String>,
    pub constant: bool,
}

/// What one folder of headers declares.
pub struct Headers {
    pub folder: PathBuf,
    /// True for TensorRT-RTX, whose version numbers start again at 1.
    pub rtx: bool,
    pub major: u32,
    pub minor: u32,
    classes: BTreeMap<String, Class>,
    /// Enum name to entries in order.
    pub enums: BTreeMap<String, Vec<(String, i64)>>,
}

#[derive(Default)]
struct Class {
    base: Option<String>,
    own: Vec<Declared>,
}

struct Declared {
    method: Method,
    overrides: bool,
}

/// Every folder below `root` that holds a `NvInferVersion.h`, parsed.
pub fn find(root: &Path) -> Vec<Headers> {
    let mut found = Vec::new();
    if root.join("NvInferVersion.h").is_file() {
        found.push(Headers::read(root));
    }
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .map(|entries| entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
        .unwrap_or_default();
    folders.sort();
    found.extend(folders.iter().flat_map(|folder| find(folder)));
    found
}

impl Headers {
    fn read(folder: &Path) -> Self {
        let version = std::fs::read_to_string(folder.join("NvInferVersion.h")).unwrap();
        let number = |part: &str| {
            let words = |name: String| {
                version.lines().find_map(|line| {
                    let mut words = line.split_whitespace();
                    (words.next() == Some("#define") && words.next() == Some(&name))
                        .then(|| words.next().and_then(|word| word.parse().ok()))
                        .flatten()
                })
            };
            words(format!("TRT_{part}_RTX"))
                .or_else(|| words(format!("TRT_{part}_ENTERPRISE")))
                .or_else(|| words(format!("NV_TENSORRT_{part}")))
                .unwrap_or_else(|| panic!("no {part} in {}", folder.display()))
        };
        let mut headers = Self {
            folder: folder.to_owned(),
            rtx: version.contains("TRT_MAJOR_RTX"),
            major: number("MAJOR"),
            minor: number("MINOR"),
            classes: BTreeMap::new(),
            enums: BTreeMap::new(),
        };
        for file in FILES {
            // Older versions have fewer files.
            if let Ok(text) = std::fs::read(folder.join(file)) {
                let tokens = tokens(&String::from_utf8_lossy(&text));
                headers.scope(&tokens, 0, "", &mut None);
            }
        }
        headers
    }

    /// The virtual table of `class` (its name without `nvinfer1::`), or nothing if it has none.
    pub fn table(&self, class: &str) -> Option<Vec<Method>> {
        let declared = self.classes.get(&format!("nvinfer1::{class}"))?;
        let mut slots = match &declared.base {
            None => Vec::new(),
            Some(base) => self.table(&self.resolve(class, base))?,
        };
        for Declared { method, overrides } in &declared.own {
            if method.name == "~" {
                if !slots.iter().any(|slot: &Method| slot.name == "~D1") {
                    for name in ["~D1", "~D0"] {
                        slots.push(Method { name: name.to_owned(), ..method.clone() });
                    }
                }
                continue;
            }
            let same = |slot: &&Method| {
                slot.name == method.name && slot.parameters == method.parameters && slot.constant == method.constant
            };
            if slots.iter().find(same).is_none() {
                assert!(!overrides, "{class}::{} overrides nothing", method.name);
                slots.push(method.clone());
            }
        }
        Some(slots)
    }

    fn resolve(&self, class: &str, base: &str) -> String {
        let namespace = class.rsplit_once("::").map_or("", |(namespace, _)| namespace);
        [format!("{namespace}::{base}"), base.to_owned(), format!("v_1_0::{base}")]
            .into_iter()
            .find(|name| self.classes.contains_key(&format!("nvinfer1::{name}")))
            .unwrap_or_else(|| panic!("`{class}` derives from `{base}`, which is not there"))
    }

    /// Reads declarations from `at` to the brace that closes the scope; returns the index after it.
    fn scope(&mut self, tokens: &[String], mut at: usize, name: &str, class: &mut Option<Class>) -> usize {
        let inner = |word: &str| if name.is_empty() { word.to_owned() } else { format!("{name}::{word}") };
        let mut statement: Vec<String> = Vec::new();
        while at < tokens.len() {
            let token = tokens[at].as_str();
            let fresh = statement.is_empty();
            match token {
                "}" => return at + 1,
                ";" => {
                    member(class, &statement);
                    statement.clear();
                    at += 1;
                }
                "public" | "protected" | "private" if fresh && tokens[at + 1] == ":" => at += 2,
                "inline" if fresh && tokens[at + 1] == "namespace" => at += 1,
                "extern" if fresh && tokens[at + 1].starts_with('"') && tokens[at + 2] == "{" => {
                    at = self.scope(tokens, at + 3, name, &mut None);
                }
                "namespace" if fresh && tokens[at + 2] == "=" => {
                    at = position(tokens, at, ";");
                }
                "namespace" if fresh => {
                    let open = position(tokens, at, "{");
                    at = self.scope(tokens, open + 1, &inner(&tokens[at + 1..open].concat()), &mut None);
                }
                "template" if fresh => {
                    statement.push(token.to_owned());
                    at = after_bracket(tokens, at + 1);
                }
                "enum" if fresh => {
                    let end = tokens[at..].iter().position(|token| token == "{" || token == ";").unwrap() + at;
                    if tokens[end] == "{" {
                        let word = &tokens[at + if tokens[at + 1] == "class" { 2 } else { 1 }];
                        let after = after_bracket(tokens, end);
                        self.enums.insert(word.clone(), entries(&tokens[end + 1..after - 1]));
                        at = after;
                    } else {
                        at = end;
                    }
                    statement.push("enum".to_owned());
                }
                "class" | "struct" if fresh || statement == ["template"] => {
                    let mut head = at + 1;
                    while ATTRIBUTES.contains(&tokens[head].as_str()) || tokens[head] == "[" {
                        head = if tokens[head] == "[" { after_bracket(tokens, head) } else { head + 1 };
                    }
                    let end = tokens[head..].iter().position(|token| token == "{" || token == ";").unwrap() + head;
                    if tokens[end] == ";" {
                        statement.clear();
                        at = end + 1;
                        continue;
                    }
                    let colon = tokens[head..end].iter().position(|token| token == ":");
                    let base = colon.map(|colon| {
                        let words = &tokens[head + colon + 1..end];
                        let kept = words.iter().filter(|word| !["public", "virtual"].contains(&word.as_str()));
                        kept.cloned().collect::<String>()
                    });
                    let own = tokens[head].clone();
                    let mut inside = Some(Class { base, own: Vec::new() });
                    at = self.scope(tokens, end + 1, &inner(&own), &mut inside);
                    if let Some(inside) = inside
                        && statement.is_empty()
                    {
                        self.classes.insert(inner(&own), inside);
                    }
                    statement.clear();
                }
                "{" => {
                    at = after_bracket(tokens, at);
                    if statement.iter().any(|word| word == "(") && statement.last().is_some_and(|last| last != "=") {
                        member(class, &statement);
                        statement.clear();
                    }
                }
                // A constructor's initialisers.
                ":" if class.is_some() && statement.iter().any(|word| word == ")") => {
                    while tokens[at] != "{" || is_member_brace(tokens, at) {
                        at = if tokens[at] == "(" || tokens[at] == "{" { after_bracket(tokens, at) } else { at + 1 };
                    }
                }
                _ => {
                    statement.push(token.to_owned());
                    at += 1;
                }
            }
        }
        at
    }
}

/// True for the brace of `name{value}`, false for a function's body.
fn is_member_brace(tokens: &[String], at: usize) -> bool {
    let before = tokens[at - 1].as_bytes()[0];
    before.is_ascii_alphabetic() && [",", "{"].contains(&tokens[after_bracket(tokens, at)].as_str())
}

fn position(tokens: &[String], from: usize, wanted: &str) -> usize {
    tokens[from..].iter().position(|token| token == wanted).unwrap() + from
}

fn member(class: &mut Option<Class>, statement: &[String]) {
    let (Some(class), Some(open)) = (class, statement.iter().position(|word| word == "(")) else { return };
    let head = &statement[..open];
    let close = after_bracket(statement, open);
    let has = |words: &[String], wanted: &str| words.iter().any(|word| word == wanted);
    let overrides = has(&statement[close..], "override");
    if !(has(head, "virtual") || overrides) || has(head, "operator") || has(head, "template") {
        return;
    }
    let Some((name, types)) = head.split_last() else { return };
    let destructor = types.last().is_some_and(|last| last == "~");
    let kept = types.iter().filter(|word| {
        !ATTRIBUTES.contains(&word.as_str()) && !["virtual", "[", "nodiscard", "]", "~"].contains(&word.as_str())
    });
    let method = Method {
        name: if destructor { "~".to_owned() } else { name.clone() },
        returns: spelled(&kept.cloned().collect::<Vec<_>>()),
        parameters: parameters(&statement[open + 1..close - 1]),
        constant: has(&statement[close..], "const"),
    };
    class.own.push(Declared { method, overrides });
}

fn split_commas(tokens: &[String]) -> Vec<Vec<String>> {
    let mut parts = vec![Vec::new()];
    let mut depth = 0;
    for token in tokens {
        depth += i32::from(["(", "<", "["].contains(&token.as_str()));
        depth -= i32::from([")", ">", "]"].contains(&token.as_str()));
        if token == "," && depth == 0 {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(token.clone());
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn parameters(tokens: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for mut words in split_commas(tokens) {
        words.truncate(words.iter().position(|word| word == "=").unwrap_or(words.len()));
        if words[0] == "[" {
            words.drain(..after_bracket(&words, 0));
        }
        // `T name[]` is a pointer.
        if let Some(open) = words.iter().position(|word| word == "[") {
            words.truncate(open - 1);
            words.push("*".to_owned());
        }
        let last = words[words.len() - 1].clone();
        let word = last.as_bytes()[0].is_ascii_alphabetic() || last.starts_with('_');
        let named = word
            && words.len() > 1
            && !KEYWORDS.contains(&last.as_str())
            && words[words.len() - 2] != "::"
            && words[..words.len() - 1].iter().any(|word| word != "const");
        if named {
            words.pop();
        }
        if words.last().is_some_and(|word| word == "const") {
            words.pop();
        }
        let indirect = words.iter().any(|word| word == "*" || word == "&");
        if words[0] == "const" {
            words.remove(0);
            if indirect {
                let end = words.iter().position(|word| word == "*" || word == "&").unwrap();
                words.insert(end, "const".to_owned());
            }
        }
        let spelled = spelled(&words);
        if spelled != "void" {
            found.push(spelled);
        }
    }
    found
}

fn spelled(words: &[String]) -> String {
    let joined = words.join(" ").replace(" :: ", "::").replace(" *", "*").replace(" &", "&");
    ["nvinfer1::", "std::", "v_1_0::"].iter().fold(joined, |text, prefix| text.replace(prefix, ""))
}

fn entries(tokens: &[String]) -> Vec<(String, i64)> {
    let mut found: Vec<(String, i64)> = Vec::new();
    let mut next = 0;
    for part in split_commas(tokens) {
        let value = match part.iter().position(|word| word == "=") {
            None => next,
            Some(equal) => {
                let text = part[equal + 1..].concat();
                let alias = || found.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
                // An entry that is computed otherwise is none that we use.
                let Some(value) = text.parse().ok().or_else(alias) else { continue };
                value
            }
        };
        next = value + 1;
        found.push((part[0].clone(), value));
    }
    found
}
