//! Page that documents all methods, and the tables of the README.

use std::fmt::Write;

use lowrank_models::adapter::compose::COMPOSITIONS;
use lowrank_models::adapter::{STRUCTURES, initialisations};
use lowrank_optim::registry::{Entry, Kind, OptionSpec};

use crate::config::SLOTS;

/// Page that documents all methods with their options, in Markdown.
pub fn page() -> String {
    let mut page = String::from(
        "# Methods\n\n\
         Generated from the registries; `LOWRANK_WRITE_DOCS=1 cargo test --release -p lowrank-train methods` rewrites it.\n\n\
         R x C is the shape of a matrix, n_min and n_max its smaller and larger side, r the rank; d_in and d_out are inputs and outputs of a layer.\n\
         Memory is counted in f32 values unless stated otherwise.\n",
    );
    for slot in SLOTS {
        page.push_str(&section(slot.kind, &slot.methods(), &format!("{}.options.NAME", slot.section)));
    }
    let _ = write!(page, "\n## {}\n\n", title(Kind::Initialisation));
    page.push_str("Set as `adapter.init`; `default` is that of the structure.\n\n| name | what it is | adapters | paper |\n|---|---|---|---|\n");
    for init in initialisations() {
        let structures = STRUCTURES.iter().filter(|structure| structure.spec.init(init.name).is_some());
        let structures = structures.map(|structure| structure.spec.name).collect::<Vec<_>>().join(", ");
        let _ = writeln!(page, "| `{}` | {} | {structures} | {} |", init.name, escaped(init.summary), papers(init));
    }
    page.push_str(&section(Kind::Composition, &compositions(), "lowrank compose --set NAME=VALUE"));
    page
}

/// Descriptions of all compositions.
pub fn compositions() -> Vec<Entry> {
    COMPOSITIONS.iter().map(|composition| composition.entry).collect()
}

/// Table of the methods of a kind, and the options of each, which are set as `key`.
fn section(kind: Kind, entries: &[Entry], key: &str) -> String {
    let mut text = format!("\n## {}\n\n{}", title(kind), table(kind, entries));
    for entry in entries {
        let (options, conditions) = (entry.options(), conditions(entry));
        if options.is_empty() && conditions.is_empty() {
            continue;
        }
        let _ = write!(text, "\n### `{}`\n\n{conditions}", entry.name);
        if !options.is_empty() {
            let _ = write!(text, "Set as `{key}`.\n\n| option | default | allowed | meaning |\n|---|---|---|---|\n");
            options.iter().for_each(|option| text.push_str(&row(option)));
        }
    }
    text
}

/// Requirements and incompatible settings of a method, one line each.
fn conditions(entry: &Entry) -> String {
    let needs = entry.needs.iter().map(|need| format!("- Needs: {need}\n"));
    let refuses = entry.refuses.iter().map(|refused| format!("- Does not combine with: {refused}\n"));
    let mut lines: String = needs.chain(refuses).collect();
    if !lines.is_empty() {
        lines.push('\n');
    }
    lines
}

/// Heading of the methods of a kind.
pub fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Optimizer => "Optimizers",
        Kind::Parameterization => "Parameterizations of the linear layers",
        Kind::Structure => "Adapters of frozen layers",
        Kind::Rule => "Training rules of adapters",
        Kind::Initialisation => "Initialisations of adapters",
        Kind::Allocation => "Allocations of ranks",
        Kind::Penalty => "Penalties",
        Kind::Composition => "Compositions of adapters",
        Kind::Objective => "Objectives",
        Kind::Recipe => "Recipes",
    }
}

/// Quantity that the memory formula of a kind counts.
pub fn counted(kind: Kind) -> &'static str {
    match kind {
        Kind::Optimizer => "state of an R x C matrix",
        Kind::Parameterization => "in place of a d_in x d_out weight",
        Kind::Structure => "trained in addition to a frozen d_in x d_out weight",
        _ => "memory",
    }
}

/// Table of methods: name, summary, memory and paper.
fn table(kind: Kind, entries: &[Entry]) -> String {
    let with_summary = entries.iter().any(|entry| entry.papers.iter().all(|paper| paper.title != entry.summary));
    let with_memory = entries.iter().any(|entry| !entry.memory.is_empty());
    let row = |cells: [&str; 4]| {
        let shown = [true, with_summary, with_memory, true];
        let cells: Vec<&str> = cells.into_iter().zip(shown).filter(|(_, shown)| *shown).map(|(cell, _)| cell).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = row(["name", "what it is", counted(kind), "paper"]);
    text.push_str(&row(["---"; 4]));
    for entry in entries {
        let name = format!("`{}`", entry.name);
        text.push_str(&row([&name, &escaped(entry.summary), &escaped(entry.memory), &papers(entry)]));
    }
    text
}

fn papers(entry: &Entry) -> String {
    let cited = entry.papers.iter().map(|paper| format!("{}, {}", escaped(paper.title), paper.cited()));
    cited.collect::<Vec<_>>().join("; ")
}

fn row(option: &OptionSpec) -> String {
    let default = option.default_text();
    let choices = option.allowed.choices();
    let mut meaning = escaped(&option.help);
    for choice in choices.iter().filter(|choice| !choice.help.is_empty()) {
        let _ = write!(meaning, " `{}`: {}", choice.word, escaped(&choice.help));
    }
    format!("| `{}` | {default} | {} | {meaning} |\n", option.name, option.allowed)
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    fn file(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
    }

    fn current(name: &str, text: &str) {
        if std::env::var_os("LOWRANK_WRITE_DOCS").is_some() {
            std::fs::write(file(name), text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(file(name)).unwrap(), text, "{name} differs from the registries");
    }

    #[test]
    fn the_committed_page_is_current() {
        current("docs/methods.md", &page());
    }

    #[test]
    fn the_tables_of_the_readme_are_current() {
        let mut readme = std::fs::read_to_string(file("README.md")).unwrap();
        let mut tables: Vec<_> = SLOTS.iter().map(|slot| (slot.section, table(slot.kind, &slot.methods()))).collect();
        tables.push(("compose", table(Kind::Composition, &compositions())));
        for (name, table) in tables {
            let [begin, end] = ["begin", "end"].map(|word| format!("<!-- {word} {name} -->\n"));
            let start = readme.find(&begin).unwrap_or_else(|| panic!("{begin}")) + begin.len();
            let stop = readme.find(&end).unwrap_or_else(|| panic!("{end}"));
            readme.replace_range(start..stop, &format!("\n{table}\n"));
        }
        current("README.md", &readme);
    }
}
