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
    assert!(["int8-g64", "int8-sq-g64", "int4-awq-g7", "awq"].into_iter().all(|name| Recipe::preset(name).is_none()));
    let rule = |rest: &str| Recipe::parse(&format!("name = 'x'\n[[rule]]\nmatch = '**'\n{rest}"), "r.toml");
    let fixed = rule("format = 'int8-sq'\nalpha = 0.85").unwrap();
    assert_eq!(methods(&fixed)[0], Method::Smooth { alpha: Some(0.85), per_token: false });
    for refused in ["format = 'int8'\nalpha = 0.5", "format = 'int8-sq'\nalpha = 1.5", "format = 'int8-sq'\ngroup = 64"]
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

#[test]
fn a_base_decides_where_no_rule_does() {
    let recipe =
        |base: &str, rule: &str| Recipe::parse(&format!("name = 'kept'\nbase = '{base}'\n[[rule]]\n{rule}"), "r.toml");
    let kept = recipe("int4", "match = '**.down_proj'\nformat = 'none'").unwrap();
    let choices = assign(&kept, LAYERS.into_iter()).unwrap();
    let formats: Vec<Option<Format>> = choices.iter().map(|choice| choice.format).collect();
    assert_eq!(formats, [Some(Format::Int4 { group: 64 }), None, None, None], "the odd layer is kept as by the preset");
    let reasons: Vec<String> = choices.iter().map(|choice| kept.reason(choice.rule)).collect();
    assert_eq!(reasons, ["preset `int4`", "rule 0 `**.down_proj`", "preset `int4`", "preset `int4`"]);
    let unused = recipe("int8", "match = '**.v_proj'\nformat = 'none'").unwrap();
    assert!(assign(&unused, LAYERS.into_iter()).unwrap_err().to_string().contains("rule 0 (`**.v_proj`) matches no"));
    let error = recipe("int9", "match = '**'\nformat = 'int8'").unwrap_err().to_string();
    assert!(error.contains("line 2: there is no quantization preset `int9`"), "{error}");
}

/// A recipe for several networks has rules for each.
#[test]
fn parts_are_checked_together() {
    let text =
        "name = 'x'\n[[rule]]\nmatch = '**.q_proj'\nformat = 'int8'\n[[rule]]\nmatch = '**.down_proj'\nformat = 'int8'";
    let recipe = Recipe::parse(text, "r.toml").unwrap();
    let parts = LAYERS.chunks(1).map(|part| assign_part(&recipe, part.iter().copied()).unwrap());
    let all: Vec<Assignment> = parts.flatten().collect();
    assert_eq!(all, assign(&recipe, LAYERS.into_iter()).unwrap());
    assert!(check_used(&recipe, &all).is_ok() && check_used(&recipe, &all[1..]).is_err());
}
