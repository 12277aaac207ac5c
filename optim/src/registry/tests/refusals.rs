//! Options that are rejected by name.

use super::*;

#[test]
fn senseless_options_are_refused_by_name_and_with_a_reason() {
    let count = |value: i64| Value::from(value);
    let number = |value: f64| Value::from(value);
    let text = |word: &str| Value::from(word);
    let cases = vec![
        ("dct-adamw", "rank", count(0)),
        ("dct-adamw", "rank", number(2.5)),
        ("dct-adamw", "rank", count(-1)),
        ("dct-adamw", "update_proj_gap", count(0)),
        ("dct-adamw", "side", text("top")),
        ("dct-adamw", "basis", text("dct4")),
        ("dct-adamw", "norm", text("l3")),
        ("dct-adamw", "error_levels", count(256)),
        ("dct-adamw", "error_levels", count(0)),
        ("dct-adamw", "rotate", count(1)),
        ("dct-adamw", "max_shape", count(0)),
        ("galore", "scale", number(0.0)),
        ("galore", "proj_bits", count(3)),
        ("galore", "projector", text("gaussian")),
        ("galore", "projector", text("columns")),
        ("galore", "moments", text("4bit")),
        ("galore", "epsilon", number(0.0)),
        ("galore", "beta_1", number(1.0)),
        ("galore", "weight_decay", number(-0.1)),
        ("fira", "growth_limit", number(1.0)),
        ("fira", "granularity", text("row")),
        ("frugal", "density", number(1.5)),
        ("frugal", "density", number(-0.5)),
        ("frugal", "update_proj_gap", count(0)),
        ("frugal", "inactive_rule", text("adam")),
        ("frugal", "inactive_lr_scale", number(-1.0)),
        ("frugal", "reset_statistics", Value::from(false)),
        ("ldadam", "rho", number(1.0)),
        ("ldadam", "projector", text("gaussian")),
        ("apollo", "scale", number(-1.0)),
        ("adamw-8bit", "block", count(100)),
        ("adamw-8bit", "block", count(32)),
        ("trion", "rank", count(0)),
        ("trion", "ns_steps", count(0)),
        ("trion", "momentum", number(1.0)),
        ("trion", "scaling", text("big")),
        ("dion", "rank_fraction", number(0.0)),
        ("dion", "rank_fraction", number(1.5)),
        ("dion", "rank_multiple_of", count(0)),
        ("dion", "power_iters", count(0)),
        ("muon", "momentum", number(-0.1)),
        ("muon", "ns_steps", count(0)),
        ("adamw", "beta_2", number(1.0)),
        ("adamw", "epsilon", number(f64::NAN)),
        ("adamw", "weight_decay", text("much")),
    ];
    for (name, option, value) in cases {
        let method = optimizer(name).unwrap();
        let mut options = Options::new();
        for required in method.options().iter().filter(|option| option.default.is_none()) {
            options.insert(required.name.clone(), count(4));
        }
        options.insert(option.to_string(), value.clone());
        let refusal = method.check(&options).expect_err(&format!("{name} {option} {value}")).to_string();
        assert!(refusal.contains(option) || refusal.contains("on_renewal"), "{name} {option} {value}: {refusal}");
    }
    let dct = optimizer("dct-adamw").unwrap();
    assert!(dct.check(&Options::new()).unwrap_err().to_string().contains("rank"));
    let slip = Options::from_iter([("beta1".to_string(), number(0.5))]);
    assert!(optimizer("adamw").unwrap().check(&slip).unwrap_err().to_string().contains("did you mean \"beta_1\""));
}

/// The worst numbers are rejected by name, or give an optimizer that steps.
#[test]
fn every_number_is_used_or_rejected_by_name() {
    let worst = [0.0, -1.0, 0.5, 1e-320, 1e308].map(Value::from);
    let whole = [0, -1, i64::MAX].map(Value::from);
    for (method, base) in variants(5) {
        for option in method.options().iter() {
            for value in worst.iter().chain(&whole) {
                let mut options = base.clone();
                options.insert(option.name.clone(), value.clone());
                let module = Matrix::new([8, 5]);
                match method.init(&options, &ParameterRoles::of(&module), &StateMeter::new()) {
                    Ok(_) => drop(Run::of(method, &options, module).step(wave([8, 5], 1.0))),
                    Err(error) => {
                        let text = error.to_string();
                        let known = [option.name.as_str(), "rank", "density", "on_renewal", "ns_steps", "projector"];
                        assert!(
                            known.iter().any(|name| text.contains(name)),
                            "{} {}: {text}",
                            method.name,
                            option.name
                        );
                    }
                }
            }
        }
    }
}
