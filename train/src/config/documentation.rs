//! Page that documents all keys.

use std::fmt::Write;

use super::keys::{Key, sections};
use super::{Job, SLOTS};

/// Page that documents all keys, in Markdown.
pub fn documentation() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         Generated from the program's own declarations; `LOWRANK_WRITE_DOCS=1 cargo test --release -p lowrank-train documentation` rewrites it.\n\n\
         A key is set in its section of the file given with `--config FILE.toml`, or on the command line as `--set section.key=value`.\n\
         Flags win over `--set`, `--set` over the file, the file over the defaults. Unknown keys and values that are not allowed are rejected, and so\n\
         are keys that the command does not support: those have a dash as default.\n\n\
         A method is named by `name` and set up by its own `options`: `[optimizer]` with `name = \"galore\"`, `[optimizer.options]` with `rank = 64`, or\n\
         `--set optimizer.options.rank=64`. `lowrank methods NAME` lists them; `lowrank config schema` prints the JSON schema of the whole file, from\n\
         which editors complete it.\n",
    );
    let [pretrain, finetune] = [Job::Pretrain, Job::Finetune].map(sections);
    let mut names: Vec<&str> = Vec::new();
    for section in pretrain.iter().chain(&finetune) {
        if !names.contains(&section.name) {
            names.push(section.name);
        }
    }
    for name in names {
        let [first, second] = [&pretrain, &finetune].map(|list| list.iter().find(|section| section.name == name));
        let Some(section) = first.or(second) else { continue };
        let [first, second] = [first, second].map(|section| section.map_or(&[][..], |section| &section.keys));
        let _ = write!(
            page,
            "\n## {name}\n\n{}\n\n| key | allowed | `pretrain` | `finetune` | meaning |\n|---|---|---|---|---|\n",
            section.help
        );
        let extra = second.iter().filter(|key| first.iter().all(|other| other.name != key.name));
        for key in first.iter().chain(extra) {
            let _ = writeln!(page, "{}", row(name, key, first, second));
        }
    }
    page
}

fn row(section: &str, key: &Key, pretrain: &[Key], finetune: &[Key]) -> String {
    let default = |keys: &[Key]| match keys.iter().find(|other| other.name == key.name) {
        None => "-".to_string(),
        Some(key) if key.option.default.as_ref().is_some_and(serde_json::Value::is_null) => key.option.default_text(),
        Some(key) => key.option.default.as_ref().map_or_else(|| "required".into(), |value| format!("`{value}`")),
    };
    let name = &key.name[section.len() + 1..];
    if key.is_options() {
        let kind = SLOTS.iter().find(|slot| key.name == format!("{}.options", slot.section)).map(|slot| slot.kind);
        let kind = kind.map(|kind| kind.to_string()).unwrap_or_default();
        let supported = |keys: &[Key]| if keys.iter().any(|other| other.name == key.name) { "" } else { "-" };
        return format!(
            "| `{name}.NAME` | see `lowrank methods` | {} | {} | Options of the {kind}. |",
            supported(pretrain),
            supported(finetune)
        );
    }
    let allowed = key.option.allowed.to_string();
    let help = key.option.help.replace('|', "\\|");
    format!("| `{name}` | {allowed} | {} | {} | {help} |", default(pretrain), default(finetune))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_documentation_is_current() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        if std::env::var_os("LOWRANK_WRITE_DOCS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, documentation()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), documentation());
    }
}
