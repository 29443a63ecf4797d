//! Splits a C++ header into tokens; comments and preprocessor lines vanish.

/// The tokens of `text`: words, `::`, string literals, and single characters.
pub fn tokens(text: &str) -> Vec<String> {
    let text = without_preprocessor(&without_comments(text));
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let byte = bytes[at];
        at += 1;
        if byte.is_ascii_whitespace() {
            continue;
        }
        if is_word(byte) {
            while at < bytes.len() && is_word(bytes[at]) {
                at += 1;
            }
        } else if byte == b':' && bytes.get(at) == Some(&b':') {
            at += 1;
        } else if byte == b'"' {
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
        } else if !byte.is_ascii() {
            continue;
        }
        found.push(text[start..at.min(text.len())].to_owned());
    }
    found
}

/// Index just after the bracket that closes the one at `open`.
pub fn after_bracket(tokens: &[String], open: usize) -> usize {
    let opening = tokens[open].as_str();
    let closing = match opening {
        "(" => ")",
        "{" => "}",
        "[" => "]",
        _ => ">",
    };
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        if token == opening {
            depth += 1;
        } else if token == closing {
            depth -= 1;
            if depth == 0 {
                return index + 1;
            }
        }
    }
    panic!("`{opening}` is never closed")
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn without_comments(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(slash) = rest.find('/') {
        kept.push_str(&rest[..slash]);
        rest = &rest[slash..];
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("/*") {
            rest = &rest[rest.find("*/").map_or(rest.len(), |end| end + 2)..];
            kept.push(' ');
        } else {
            kept.push('/');
            rest = &rest[1..];
        }
    }
    kept + rest
}

/// Every branch of an `#if` is kept: the supported headers need no more, and the tables prove it.
fn without_preprocessor(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut continued = false;
    for line in text.lines() {
        let directive = continued || line.trim_start().starts_with('#');
        continued = directive && line.trim_end().ends_with('\\');
        if !directive {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}
