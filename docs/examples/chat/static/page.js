// What a page has whatever it is about: elements, initials, a scroll that stays where one reads, drawers and a theme.
// Nothing in here knows of messages, groups or the server.

export const $ = (id) => document.getElementById(id);

export function el(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content); // strings become text nodes
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // unchanged text is not announced again
}

/** Initials in a colour that comes from the key; the contrast comes from the stylesheet. */
export function dress(element, key, name) {
  const words = name.trim().split(/\s+/);
  const letters = words.length > 1 ? [[...words[0]][0], [...words.at(-1)][0]] : [...words[0]].slice(0, 2);
  element.textContent = letters.join("").toUpperCase();
  const sum = [...key].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7);
  element.style.setProperty("--hue", (sum * 47) % 360);
  return element;
}

export function face(key, name) {
  const element = dress(el("span", "initials"), key, name);
  element.setAttribute("aria-hidden", "true");
  return element;
}

/** Bring the children of a list to the wanted ones and touch nothing that is already right. */
export function reconcile(list, wanted) {
  const keep = new Set(wanted);
  for (const child of [...list.children]) if (!keep.has(child)) child.remove();
  wanted.forEach((element, place) => list.children[place] === element || list.insertBefore(element, list.children[place] ?? null));
}

/** The textarea grows with its text where the browser cannot do that itself. */
export function fit(textarea) {
  if (CSS.supports("field-sizing", "content")) return;
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + 2}px`;
}

// Who reads the newest line keeps seeing it, whatever grows or shrinks; who has scrolled up is left in peace.
export const reading = {
  atEnd: true,
  stay() {
    if (reading.atEnd) $("scroll").scrollTop = $("scroll").scrollHeight;
  },
};
const sizes = new ResizeObserver(reading.stay);
for (const id of ["scroll", "log"]) sizes.observe($(id));
$("scroll").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  reading.atEnd = scrollHeight - scrollTop - clientHeight < 80;
});

// Drawers, where the window is too narrow for columns.

export const narrow = { rail: matchMedia("(max-width: 46rem)"), people: matchMedia("(max-width: 67rem)") };

function openDrawer(name) {
  $("app").dataset.drawer = name;
  drawDrawers();
  $(name).querySelector("[data-close]").focus();
}

export function closeDrawer() {
  const name = $("app").dataset.drawer;
  if (!name) return;
  delete $("app").dataset.drawer;
  drawDrawers();
  $(`show-${name}`).focus();
}

function drawDrawers() {
  const open = $("app").dataset.drawer;
  for (const name of ["rail", "people"]) {
    $(name).inert = narrow[name].matches && open !== name;
    $(`show-${name}`).setAttribute("aria-expanded", String(open === name));
  }
  document.querySelector(".talk").inert = Boolean(open && narrow[open].matches);
}

for (const name of ["rail", "people"]) $(`show-${name}`).onclick = () => openDrawer(name);
for (const element of document.querySelectorAll("[data-close]")) element.addEventListener("click", closeDrawer);
for (const query of Object.values(narrow)) query.onchange = () => (closeDrawer(), drawDrawers());
addEventListener("keydown", (event) => event.key === "Escape" && closeDrawer());
drawDrawers();

// Light or dark, as the system has it until one chooses.

const root = document.documentElement;
const chosen = localStorage.getItem("theme");
if (chosen) root.dataset.theme = chosen;
$("theme").onclick = () => {
  const now = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
};
