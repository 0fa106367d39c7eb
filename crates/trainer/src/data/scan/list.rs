//! Images whose captions are in a list.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use crate::data::error::{DatasetError, read_error};
use crate::data::image::is_image_extension;
use crate::data::metadata::{Row, read_list, wrong_line};
use crate::nearest::one_line;

use super::names::{file_name, key, more, split};
use super::pair::{Folder, List, Pair};

/// The images of a list, which are all images in the folders it is for.
pub(super) fn listed(
    root: &Path,
    list: &List,
    folders: &[&Folder],
) -> Result<Vec<Pair>, DatasetError> {
    let mut there: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for folder in folders {
        for image in &folder.images {
            let name = format!("{}{image}", folder.prefix);
            let inner = &name[list.prefix.len()..];
            there.entry(key(inner)).or_default().push(inner.to_owned());
        }
    }
    let mut first_lines: BTreeMap<String, usize> = BTreeMap::new();
    let mut pairs = Vec::new();
    let mut references: BTreeSet<String> = BTreeSet::new();
    for row in read_list(&list.path)? {
        let Row { line, quoted, .. } = &row;
        let wrong = |problem: String| wrong_line(&list.path, *line, problem);
        if !is_image_extension(split(&row.name).1) {
            let problem = format!(
                "file_name `{quoted}` does not end in png, jpg, jpeg or webp, nor bmp or tiff"
            );
            return Err(wrong(problem));
        }
        let base = root.join(&list.prefix);
        // written in another case or another form of Unicode than the file's name
        let name = match there.get(&key(&row.name)).map(Vec::as_slice) {
            Some([only]) if !base.join(&row.name).exists() => only.clone(),
            _ => row.name.clone(),
        };
        if let Some(first) = first_lines.insert(name.clone(), *line) {
            let problem = format!("file_name `{quoted}` was already listed on line {first}");
            return Err(wrong(problem));
        }
        let image = base.join(&name);
        match fs::metadata(&image) {
            Ok(_) => {} // looked at when it is read
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(wrong(format!("image `{quoted}` does not exist")));
            }
            Err(error) => return Err(read_error(&image, error)),
        }
        for reference in &row.references {
            if !base.join(reference).is_file() {
                let problem = format!("reference `{}` does not exist", one_line(reference));
                return Err(wrong(problem));
            }
            references.insert(key(reference));
        }
        let own = row.references.iter().map(|reference| base.join(reference));
        pairs.push(Pair {
            name: format!("{}{name}", list.prefix),
            image,
            caption: row.caption,
            references: own.collect(),
        });
    }
    let list_name = file_name(list.path.to_str().unwrap_or_default());
    let all = there.values().flatten();
    let missing: Vec<&String> = all
        .filter(|it| !first_lines.contains_key(*it) && !references.contains(&key(it)))
        .collect();
    if let Some(first) = missing.iter().min() {
        return Err(DatasetError::Unlisted {
            image: root.join(&list.prefix).join(first),
            list: list_name.into(),
            more: more(missing.len() - 1, "image"),
        });
    }
    for folder in folders {
        let stems: BTreeMap<String, &String> = folder
            .images
            .iter()
            .map(|name| (key(split(name).0), name))
            .collect();
        for caption in &folder.captions {
            if let Some(image) = stems.get(&key(split(caption).0)) {
                return Err(DatasetError::TwoCaptions {
                    image: root.join(&folder.prefix).join(image),
                    list: list_name.into(),
                    caption: one_line(caption),
                });
            }
        }
    }
    Ok(pairs)
}
