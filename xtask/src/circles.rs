//! Circles of imports: files of one crate that `use` each other, tests left out. A plain type in the wrong file makes them.
//!
//! A file imports what its `use` declarations and its paths from `crate::` or `super::` name; a name that a module only passes on
//! (`pub use`) is looked for where that leads, so declaring and re-exporting children is no import of them. The text is read by
//! line, as rustfmt leaves it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A module's path from the crate's root.
type Module = Vec<String>;

/// What one file says.
#[derive(Default)]
struct File {
    imports: Vec<Module>,
    /// Names that are passed on, and what they are.
    passed_on: BTreeMap<String, Module>,
}

/// One circle of each crate in `folder` that has some, as its files.
pub fn circles(folder: &Path) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for source in children(folder)?.iter().map(|path| path.join("src")) {
        let mut files = BTreeMap::new();
        read(&source, "lib", Vec::new(), &mut files)?;
        if let Some(circle) = circle(&graph(&files)) {
            let names: Vec<String> = circle.iter().map(|module| module.join("::")).collect();
            found.push(format!("{}: {}", source.display(), names.join(" -> ")));
        }
    }
    Ok(found)
}

fn children(folder: &Path) -> Result<Vec<std::path::PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Reads the module `name` in `folder`, and those that it declares.
fn read(
    folder: &Path,
    name: &str,
    module: Module,
    files: &mut BTreeMap<Module, File>,
) -> Result<(), String> {
    let (file, inner) = (folder.join(format!("{name}.rs")), folder.join(name));
    let file = if file.is_file() {
        file
    } else {
        inner.join("mod.rs")
    };
    let text = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let text = without_tests(&text);
    let inner = if module.is_empty() { folder } else { &inner };
    let mut declared = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_suffix(';')) {
        let line = line.split_once(") ").map_or(line, |(_, rest)| rest);
        if let Some(child) = line.trim_start_matches("pub ").strip_prefix("mod ") {
            declared.push(child.to_string());
            let path = [&module[..], &[child.into()]].concat();
            read(inner, child, path, files)?;
        }
    }
    let file = File::new(&text, &module, &declared);
    files.insert(module, file);
    Ok(())
}

/// The lines without comments and without what is only compiled for tests.
fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let code = line.split("//").next().unwrap_or_default().trim_end();
        if !(code.trim_start().starts_with("#[cfg(") && code.contains("test")) {
            kept += code;
            kept += "\n";
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        // An item ends on its first line at this depth that ends a statement or a block.
        lines.by_ref().find(|line| {
            let (before, code) = line.split_at(indent.min(line.len()));
            let code = code.trim_end();
            before.trim().is_empty()
                && !code.starts_with(' ')
                && (code.ends_with(';') || code.ends_with('}') || code.ends_with("},"))
        });
    }
    kept
}

impl File {
    fn new(text: &str, module: &Module, declared: &[String]) -> Self {
        let mut file = Self::default();
        let mut rest = String::new();
        for statement in text.split_inclusive(';') {
            let start = statement
                .rfind("\nuse ")
                .or_else(|| statement.rfind("\npub"));
            let start = start.filter(|_| statement.contains("use "));
            let (before, tree) = statement.split_at(start.unwrap_or(statement.len()));
            rest += before;
            let Some((visibility, tree)) = tree.split_once("use ") else {
                rest += tree;
                continue;
            };
            let mut paths = Vec::new();
            expand("", tree.trim_end_matches(';'), &mut paths);
            for path in paths {
                let Some(path) = absolute(&path, module, declared) else {
                    continue;
                };
                match (visibility.trim().is_empty(), path.last()) {
                    (false, Some(name)) => drop(file.passed_on.insert(name.clone(), path)),
                    _ => file.imports.push(path),
                }
            }
        }
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        for word in rest.split(|c| !is_word(c)) {
            if word.starts_with("crate::") || word.starts_with("super::") {
                file.imports.extend(absolute(word, module, declared));
            }
        }
        file
    }
}

/// The paths of a tree of `use`: `a::{b, c::d as e}` is `a::b` and `a::c::d`.
fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
    let tree = tree.trim();
    let Some((head, inner)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        paths.push(format!("{prefix}{path}"));
        return;
    };
    let prefix = format!("{prefix}{head}");
    let inner = inner.trim_end().strip_suffix('}').unwrap_or(inner);
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inner[start..at].trim().is_empty() {
                    expand(&prefix, &inner[start..at], paths);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// The path from the crate's root; none if it leads out of the crate.
fn absolute(path: &str, module: &Module, declared: &[String]) -> Option<Module> {
    let parts: Vec<&str> = path.split("::").filter(|part| !part.is_empty()).collect();
    let first = *parts.first()?;
    let ups = parts.iter().take_while(|part| **part == "super").count();
    let (base, rest) = match first {
        "crate" => (&[][..], &parts[1..]),
        "super" => (&module[..module.len().checked_sub(ups)?], &parts[ups..]),
        "self" => (&module[..], &parts[1..]),
        child if declared.iter().any(|name| name == child) => (&module[..], &parts[..]),
        _ => return None,
    };
    let rest = rest.iter().filter(|part| **part != "self" && **part != "*");
    let rest = rest.map(|part| part.to_string());
    Some(base.iter().cloned().chain(rest).collect())
}

/// What each file imports of the others.
fn graph(files: &BTreeMap<Module, File>) -> BTreeMap<&Module, BTreeSet<&Module>> {
    let edges = files.iter().map(|(module, file)| {
        let imported = file.imports.iter();
        let imported = imported.map(|path| defining(path, files, 0));
        (module, imported.filter(|other| *other != module).collect())
    });
    edges.collect()
}

/// The file that defines what is at `path`.
fn defining<'a>(path: &[String], files: &'a BTreeMap<Module, File>, depth: usize) -> &'a Module {
    let inside = (0..=path.len())
        .rev()
        .find_map(|n| Some((n, files.get_key_value(&path[..n])?)));
    let (n, (module, file)) = inside.expect("the root is a file");
    let passed_on = path.get(n).and_then(|name| file.passed_on.get(name));
    match passed_on {
        Some(further) if depth < 8 => {
            defining(&[further, &path[n + 1..]].concat(), files, depth + 1)
        }
        _ => module,
    }
}

/// A circle, its first file again at its end.
fn circle<'a>(graph: &BTreeMap<&'a Module, BTreeSet<&'a Module>>) -> Option<Vec<&'a Module>> {
    let mut graph = graph.clone();
    // What imports nothing that is left is in no circle.
    while let Some(done) = graph
        .iter()
        .find_map(|(m, others)| others.is_empty().then_some(*m))
    {
        graph.remove(done);
        graph
            .values_mut()
            .for_each(|others| _ = others.remove(done));
    }
    let mut way = vec![*graph.keys().next()?];
    loop {
        let next = *graph[way[way.len() - 1]].first()?;
        let before = way.iter().position(|module| *module == next);
        way.push(next);
        if let Some(start) = before {
            return Some(way.split_off(start));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found in a crate of a root and the modules `a` and `b`.
    fn found(name: &str, root: &str, a: &str, b: &str) -> Vec<String> {
        let folder = std::env::temp_dir().join(format!("circles-{name}-{}", std::process::id()));
        let source = folder.join("made-up/src");
        fs::create_dir_all(source.join("b")).expect("writable");
        for (file, text) in [("lib.rs", root), ("a.rs", a), ("b/mod.rs", b)] {
            fs::write(source.join(file), text).expect("writable");
        }
        fs::write(source.join("b/deep.rs"), "pub struct Deep;\n").expect("writable");
        let found = circles(&folder).expect("readable");
        fs::remove_dir_all(&folder).expect("there");
        found
            .iter()
            .map(|circle| circle.split(": ").last().unwrap_or_default().into())
            .collect()
    }

    #[test]
    fn two_files_that_import_each_other_are_a_circle() {
        let root = "mod a;\npub(crate) mod b;\n\npub use b::{deep::Deep, B};\n";
        let a = "use std::fs;\n\nuse crate::B;\n\npub struct A(B);\n";
        let b = "pub mod deep;\n\npub struct B;\n";
        assert_eq!(found("none", root, a, b), [""; 0]);
        let imports =
            "pub mod deep;\n\nuse super::{\n    a::A as Other,\n};\n\npub struct B(Other);\n";
        assert_eq!(found("use", root, a, imports), ["a -> b -> a"]);
        let path = "pub mod deep;\n\npub struct B(crate::a::A);\n";
        assert_eq!(found("path", root, a, path), ["a -> b -> a"]);
        // Where a re-export leads is another file, and a test may import what it likes.
        let tested = format!("{b}\n#[cfg(test)]\nmod tests {{\n    use crate::a::A;\n}}\n");
        assert_eq!(found("test", root, a, &tested), [""; 0]);
        let deep = "use crate::Deep;\n\npub struct A(Deep);\n";
        assert_eq!(found("deep", root, deep, imports), [""; 0]);
    }
}
