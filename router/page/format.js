// Numbers as people read them, and DOM nodes without markup: text only ever becomes text.

export const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
};

export const count = (value) => (Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : "–");

export const short = (value) => {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toFixed(1)}G`;
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(0)}K`;
  if (size >= 1e3) return `${(value / 1e3).toFixed(1)}K`;
  return size >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
};

export const bytes = (value) => {
  if (!Number.isFinite(value)) return "–";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${Math.round(value)} B`;
};

export const speed = (gigabytes) => (gigabytes < 0.1 ? `${(gigabytes * 1e3).toFixed(gigabytes < 0.01 ? 1 : 0)} MB/s` : `${gigabytes.toFixed(gigabytes < 10 ? 2 : 0)} GB/s`);

export const ms = (value) => {
  if (!Number.isFinite(value)) return "–";
  if (value >= 60_000) return `${Math.floor(value / 60_000)} min ${Math.round((value % 60_000) / 1000)} s`;
  if (value >= 10_000) return `${(value / 1000).toFixed(1)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return value >= 100 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
};

export const seconds = (value) => ms(value * 1000);

export const percent = (share) => (Number.isFinite(share) ? `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%` : "–");
