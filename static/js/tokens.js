// A snippet of highlighted tokens is one tab stop; the arrow keys walk over its active tokens, Home and End jump.
document.addEventListener("keydown", (event) => {
  const token = event.target.closest?.(".t[tabindex]");
  if (!token || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const all = [...token.closest(".tokens").querySelectorAll(".t[tabindex]")];
  const at = all.indexOf(token);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = all[Math.min(Math.max(to, 0), all.length - 1)];
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
